"""What a run says of its steps: files, pictures, the terminal, and a watchdog."""
