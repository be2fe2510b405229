"""Side-by-side measurements; each runs alone and prints JSON lines."""
