"""Chooses how to split a training step over a machine, before it is rented."""
