"""The data path: text to shards, and shards to batches, each beside what one would use instead."""

import argparse
from typing import Any

from pipeline.benchmark import preparing, streaming
from pipeline.data.shards.manifest import read_manifest

_PARTS = {"preparing": preparing, "streaming": streaming}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each part.

    Raises:
        DataError: `--data` is no prepared folder; found before the part that does not need it is measured.
    """
    if options.data is not None and options.only != "preparing":
        read_manifest(options.data)
    return {name: part.measure(options) for name, part in _PARTS.items() if options.only in (None, name)}


def table(figures: dict[str, Any]) -> str:
    """Return the tables of the parts, each under its name."""
    return "\n\n".join(f"{name}\n{_PARTS[name].table(of_part)}" for name, of_part in figures.items())
