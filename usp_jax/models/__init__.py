"""Language models whose attention is `usp_jax`'s; each is imported by its own name."""
