"""The looks of heads, runs and sources: colours, and dashes where these repeat. Without matplotlib, which is slow to load."""

from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#e6ab02", "#8c564b", "#e377c2", "#7f7f7f", "#17becf", "#222222")
_DASH, _DOT = (5.0, 2.0), (1.0, 2.0)


class Look(NamedTuple):
    """The look of a line. dashes: the lengths of its dashes and gaps in turn, in widths of the line; none if it is solid."""

    colour: str
    dashes: tuple[float, ...] = ()


def looks_of(keys: Sequence[str]) -> dict[str, Look]:
    """A look for each key, in their order, no two alike: the colours as solid lines, then dashed, and each round has a dot more
    between its dashes."""
    looks = {}
    for number, key in enumerate(dict.fromkeys(keys)):
        turn, place = divmod(number, len(COLOURS))
        looks[key] = Look(COLOURS[place], _DASH + (turn - 1) * _DOT if turn else ())
    return looks
