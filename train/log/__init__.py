"""Reporting of a run's training steps: files, plots, the terminal, and a watchdog."""
