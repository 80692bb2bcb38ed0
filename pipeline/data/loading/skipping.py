"""Stretches of rows that a run leaves out, as it does after a loss spike.

The position of a run stays one integer, the samples that it has consumed, and the row at each position stays a pure function:
of that integer and of the stretches. A stretch [start, end) is in rows of the order that nothing is left out of, and begins and
ends where a step does.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.loading.lane_reader import RowOrder


class Stretch(NamedTuple):
    """Rows [start, end)."""

    start: int
    end: int


def position_of(number: int, skipped: Iterable[Sequence[int]]) -> int:
    """The row that comes after `number` others, of the order without the stretches (apart, and in order)."""
    for start, end in skipped:
        if number < start:
            break
        number += end - start
    return number


def with_stretch(skipped: Sequence[Sequence[int]], first: int, count: int) -> list[Stretch]:
    """Leave out `count` more rows: from the one that comes after `first` others on, as the order is now."""
    more = Stretch(position_of(first, skipped), position_of(first + count, skipped))
    joined: list[Stretch] = []
    for start, end in sorted([*map(tuple, skipped), more]):
        if joined and start <= joined[-1].end:
            joined[-1] = Stretch(joined[-1].start, max(joined[-1].end, end))
        else:
            joined.append(Stretch(start, end))
    return joined


class SkippingOrder:
    """An order of rows without some stretches of them.

    skipped: stretches in rounds (a sample of each lane), apart and in order.
    """

    def __init__(self, order: RowOrder, skipped: Sequence[Stretch]):
        self.order = order
        self.skipped = skipped

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Locate the samples of one lane in consecutive rounds of those that are left, as `RowOrder` says."""
        found = []
        while num_rounds:
            position = position_of(first_round, self.skipped)
            before = [start - position for start, _ in self.skipped if start > position]
            count = min([num_rounds, *before])
            found.append(self.order.locate_lane(lane, position, count))
            first_round, num_rounds = first_round + count, num_rounds - count
        sets, shards, samples = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return sets, shards, samples
