"""The colours of heads, runs and sources. Without matplotlib, which takes a second to load."""

from collections.abc import Sequence

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#e6ab02", "#8c564b", "#e377c2", "#7f7f7f", "#17becf", "#222222")


def colours_of(keys: Sequence[str]) -> dict[str, str]:
    """A colour for each key, in their order."""
    return {key: COLOURS[number % len(COLOURS)] for number, key in enumerate(dict.fromkeys(keys))}
