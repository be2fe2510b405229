"""Ways to start a run on the machines that it needs; docs/launching.md tells of all."""
