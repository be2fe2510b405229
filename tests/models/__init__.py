"""Tests of `usp_jax.models`."""
