"""Every step's samples against the order that they should have come in, and how often each sample was read.

The order is a pure function of what events.jsonl records of it, so it is computed again here, without the data. A step's digest
was taken of the rows that reached the ranks, of samples whose bytes had the checksums of the manifest.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.audit.history import Event, History
from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import MixtureOrder
from pipeline.data.loading.order_record import order_of_record, sample_numbers
from pipeline.data.loading.row_digest import row_hashes
from pipeline.data.loading.skipping import Stretch, position_of
from pipeline.runtime.events import EVENTS_FILE

_ROWS_AT_A_TIME = 2**18
_MOST_COUNTED = 2**28


class SetReport(NamedTuple):
    """Reading of a data set. rows: read so far. left_out: rows that were not, on purpose. epochs: how far its order has come,
    both counted. most: how often the sample read most often was."""

    name: str
    samples: int
    rows: int
    left_out: int
    epochs: float
    left_over_an_epoch: int
    most: int


class SampleReport(NamedTuple):
    """verified: steps whose samples are those of the order. sets: none where the order has changed, or there are too many
    samples to count each."""

    verified: int
    sets: list[SetReport]
    problems: list[str]


def check_samples(history: History) -> SampleReport:
    """Compare each step's digest with that of the order, abandoned steps included, and count what the line has read."""
    by_order: dict[int, list[Event]] = defaultdict(list)
    for event in history.steps:
        by_order[event.order].append(event)

    verified, sets, problems = 0, list[SetReport](), list[str]()
    for number, steps in by_order.items():
        order = _order(history, number)
        if isinstance(order, str):
            problems.append(order)
            continue
        num_rows = history.orders[number]["global_batch"]
        counts = _Counts(order) if len(by_order) == 1 else None
        wrong = [event for each in _by_left_out(steps) for event in _wrong_steps(each, order, num_rows, counts)]
        verified += len(steps) - len(wrong)
        problems += map(_sentence, wrong)
        if counts is not None and counts.is_kept and not wrong and _is_unbroken(history):
            come_to = counts.leave_out(history.left_out, len(history.line) * num_rows)
            sets = counts.reports([each["name"] for each in history.orders[number]["sets"]], come_to)
            problems += counts.problems([each.name for each in sets], come_to // order.lanes)
    return SampleReport(verified, sets, problems)


def _order(history: History, number: int) -> MixtureOrder | str:
    """The order of this number, or what is wrong with its record."""
    if number < 0:
        return f"{EVENTS_FILE}: steps before any order of samples is recorded"
    try:
        return order_of_record(history.orders[number])
    except (KeyError, TypeError, ValueError, OverflowError, DataError) as error:
        return f"{EVENTS_FILE}: the record of the order of samples is damaged: {type(error).__name__}: {error}"


def _by_left_out(steps: Sequence[Event]) -> Iterable[list[Event]]:
    """The steps, together where the same rows were left out."""
    together: dict[tuple[Stretch, ...], list[Event]] = defaultdict(list)
    for event in steps:
        together[event.skipped].append(event)
    return together.values()


def _is_unbroken(history: History) -> bool:
    return list(history.line) == list(range(1, len(history.line) + 1))


def _sentence(event: Event) -> str:
    where = f"step {event.step} ({EVENTS_FILE}, line {event.line})"
    return f"{where}: its samples are not those of the order, or not in their rows: digest {event.values['digest']}"


def _wrong_steps(steps: Sequence[Event], order: MixtureOrder, num_rows: int, counts: "_Counts | None") -> Iterator[Event]:
    """The steps with another digest than the order has at their place; the samples of the line's other steps are counted.

    The same rows are left out in all of them.
    """
    by_row: dict[int, list[Event]] = defaultdict(list)
    for event in steps:
        first_row = event.values["samples"] - num_rows
        if first_row < 0 or first_row % num_rows:
            yield event
        else:
            by_row[first_row].append(event)

    for first_row, numbers, digest in _expected(sorted(by_row), order, steps[0].skipped, num_rows):
        for event in by_row[first_row]:
            if event.values["digest"] != f"{digest:016x}":
                yield event
            elif counts is not None and not event.abandoned:
                counts.add(numbers)


def _expected(
    first_rows: Sequence[int], order: MixtureOrder, skipped: Sequence[Stretch], num_rows: int
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(first row, numbers of the samples, digest) of each step that begins at one of these rows."""
    at_a_time = max(1, _ROWS_AT_A_TIME // num_rows)
    place = 0
    while place < len(first_rows):
        # Steps that follow one another are located together.
        end = place + 1
        while end < len(first_rows) and end - place < at_a_time and first_rows[end] == first_rows[end - 1] + num_rows:
            end += 1
        first, rows = first_rows[place], (end - place) * num_rows
        numbers = sample_numbers(order, first // order.lanes, rows // order.lanes, skipped)
        hashes = row_hashes(first + np.arange(rows, dtype=np.int64), numbers).reshape(-1, num_rows)
        digests = hashes.sum(1, dtype=np.uint64).tolist()
        yield from zip(first_rows[place:end], numbers.reshape(-1, num_rows), digests, strict=True)
        place = end


class _Counts:
    """Counts of how often each sample was read, over all sets. is_kept: false where there are too many samples for that."""

    def __init__(self, order: MixtureOrder):
        self.order = order
        sizes = [each.num_samples for each in order.orders]
        self._ends = np.cumsum(sizes)
        self.is_kept = sum(sizes) <= _MOST_COUNTED
        self._counts = np.zeros(sum(sizes) if self.is_kept else 0, np.uint32)
        self._left_out = np.zeros(len(self._counts), np.uint32)

    def add(self, numbers: np.ndarray) -> None:
        if self.is_kept:
            np.add.at(self._counts, numbers, 1)

    def leave_out(self, skipped: Sequence[Stretch], num_rows: int) -> int:
        """Count what was left out of the order until so many rows were read; returns the row that the order has come to."""
        come_to = position_of(num_rows, skipped)
        for start, end in skipped:
            for first in range(start, min(end, come_to), _ROWS_AT_A_TIME):
                rounds = (min(first + _ROWS_AT_A_TIME, end) - first) // self.order.lanes
                np.add.at(self._left_out, sample_numbers(self.order, first // self.order.lanes, rounds), 1)
        return come_to

    def reports(self, names: Sequence[str], come_to: int) -> list[SetReport]:
        """Report on each set, where the order has come to this row."""
        reports = []
        for at, (name, of, rows) in enumerate(zip(names, self.order.orders, self.order.consumed(come_to), strict=True)):
            left_out, most = int(self._of(self._left_out, at).sum()), int(self._of(self._counts, at).max())
            epochs = rows / of.samples_per_epoch
            reports.append(SetReport(name, of.num_samples, rows - left_out, left_out, epochs, of.dropped_per_epoch, most))
        return reports

    def problems(self, names: Sequence[str], num_rounds: int) -> Iterator[str]:
        """Samples that were read more often than there were epochs, or missed in whole epochs."""
        taken = np.array([self.order.schedule.counts(lane, num_rounds) for lane in range(self.order.lanes)])
        for at, (name, of) in enumerate(zip(names, self.order.orders, strict=True)):
            # Lanes of a mixture need not be in the same epoch.
            begun, whole = -(-int(taken[:, at].max()) // of.samples_per_lane), int(taken[:, at].min()) // of.samples_per_lane
            counts = self._of(self._counts, at).astype(np.int64) + self._of(self._left_out, at)
            where = f"set {name}: " if name else ""
            if counts.max() > begun:
                yield f"{where}a sample was read, or left out on purpose, {counts.max()} times in {begun} epoch(s)"
            missed = int(np.maximum(whole - counts, 0).sum())
            if missed > whole * of.dropped_per_epoch:
                yield f"{where}{missed} samples were missed in {whole} whole epoch(s), more than what is left over"

    def _of(self, counts: np.ndarray, at: int) -> np.ndarray:
        return counts[self._ends[at] - self.order.orders[at].num_samples : self._ends[at]]
