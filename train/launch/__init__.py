"""Launchers that start a run on its machines; see docs/launching.md."""
