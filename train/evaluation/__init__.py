"""Evaluations of a model: held-out loss, long contexts, passkeys, and samples."""
