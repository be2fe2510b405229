"""Tests of usp_jax and of the training program, in folders that mirror them."""
