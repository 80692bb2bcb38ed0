"""Measurements of the pipeline's own parts beside what a user would have without them; see launch/benchmark.py."""
