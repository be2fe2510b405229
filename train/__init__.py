"""The training program, run from the checkout: `python -m train PRESET`."""
