"""Checks of single numbers and switches, for all modules."""

import numpy as np


def check_bool(name: str, value: bool) -> None:
    """Checks that a static switch is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_positive_int(name: str, value: int) -> None:
    """Checks that `value` is a Python int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive int")


def check_count(name: str, value: int | np.integer, *, least: int) -> None:
    """Checks that `value`, a Python or numpy int, is at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}={value!r} must be an int, {least} or greater")
