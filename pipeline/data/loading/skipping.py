"""Stretches of rows that a run leaves out, as it does after a loss spike.

The position of a run stays one integer, the samples that it has consumed, and the row at each position stays a pure function:
of that integer and of the stretches. A stretch [start, end) is in rows of the order that nothing is left out of, and begins and
ends where a step does.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class RowOrder(Protocol):
    """An order of rows: which sample each lane has in each round."""

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Locate the samples of one lane in consecutive rounds: set, shard and sample indices, int64 [num_rounds] each. For the
        set `lane_reader.PADDING` there is a row of padding."""
        ...


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


def added_stretch(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> Stretch | None:
    """Find what `with_stretch` was given to come from one to the other: [first, first + count) of the rows that are left."""
    old = [tuple(each) for each in before]
    new = next((number for number, each in enumerate(after) if tuple(each) not in old[number : number + 1]), None)
    if new is None:
        return None
    start = after[new][0]
    row = old[new][1] if new < len(old) and old[new][0] == start else start
    first = row - sum(end - start for start, end in old if start < row)
    count = sum(end - start for start, end in after) - sum(end - start for start, end in old)
    found = count > 0 and [tuple(each) for each in with_stretch(old, first, count)] == [tuple(each) for each in after]
    return Stretch(first, first + count) if found else None


def checked_stretches(given: Iterable[Sequence[int]], step_rows: int) -> list[Stretch]:
    """Read stretches that a user or a record gives.

    Raises:
        TypeError, ValueError, OverflowError: they are no stretches of whole steps, apart and in order.
    """
    stretches = [Stretch(*map(int, each)) for each in given]
    before = -1
    for start, end in stretches:
        if not before < start < end < 2**53 or start % step_rows or end % step_rows:
            raise ValueError(
                f"expected stretches of rows, first and end, in multiples of {step_rows} (rows of a step), apart and in order; "
                f"got {[list(each) for each in stretches]}"
            )
        before = end
    return stretches


def without_rows(order: RowOrder, skipped: Iterable[Sequence[int]], lanes: int) -> RowOrder:
    """Leave stretches of rows out of an order of so many lanes."""
    rounds = [Stretch(start // lanes, end // lanes) for start, end in skipped]
    return SkippingOrder(order, rounds) if rounds else order


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
