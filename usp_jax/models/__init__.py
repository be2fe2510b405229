"""Language models built on `usp_jax` attention; import each module by name."""
