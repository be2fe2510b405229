"""Benchmark programs, each of which runs on its own and prints JSON lines."""
