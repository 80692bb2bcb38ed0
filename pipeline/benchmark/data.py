"""The data path: text to shards, and shards to batches, each beside what one would use instead."""

import argparse
from typing import Any

from pipeline.benchmark import preparing, streaming

_PARTS = {"preparing": preparing, "streaming": streaming}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each part."""
    return {name: part.measure(options) for name, part in _PARTS.items() if options.only in (None, name)}


def table(figures: dict[str, Any]) -> str:
    """Return the tables of the parts, each under its name."""
    return "\n\n".join(f"{name}\n{_PARTS[name].table(of_part)}" for name, of_part in figures.items())
