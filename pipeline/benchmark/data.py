"""The data path: text to shards, and shards to batches, each beside what one would use instead."""

import argparse
from typing import Any

from pipeline.benchmark import preparing, streaming

_PARTS = {"preparing": preparing, "streaming": streaming}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both parts."""
    parser.add_argument("--only", choices=list(_PARTS), help="measure one of the two")
    for name, part in _PARTS.items():
        part.add_arguments(parser.add_argument_group(name, (part.__doc__ or "").partition("\n")[0]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each part."""
    return {name: part.measure(options) for name, part in _PARTS.items() if options.only in (None, name)}


def table(figures: dict[str, Any]) -> str:
    """Return the tables of the parts, each under its name."""
    return "\n\n".join(f"{name}\n{_PARTS[name].table(of_part)}" for name, of_part in figures.items())
