"""Runs a plain function on several gloo ranks, each a process of its own, and brings back what each returns."""

from pipeline.benchmark.ranks import run_ranks

__all__ = ["run_ranks"]
