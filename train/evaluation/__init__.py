"""What a model can do: held-out loss, long contexts, passkeys, and text it writes."""
