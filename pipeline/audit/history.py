"""The history of a run, from events.jsonl: the line of steps that it has ended up with, and what was abandoned on the way.

A run that is killed goes on from a checkpoint, and one that is asked to (`--from-step`) from an older one; the steps after it
are then abandoned, and trained again. The *line* has each step once: the one that the weights of now descend from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.data.loading.skipping import Stretch, added_stretch, checked_stretches, position_of
from pipeline.runtime.events import EVENTS_FILE
from pipeline.runtime.preemption import EXIT_HANG, EXIT_TRY_AGAIN
from pipeline.storage.json_lines import read_json_lines

_FIELDS: dict[str, dict[str, Any]] = {
    "start": {"began": (int, float), "ranks": int},
    "order": {"lanes": int, "seed": int, "shuffle_block": int, "global_batch": int, "sets": list},
    "resume": {"step": int, "samples": int},
    "step": {"step": int, "samples": int, "digest": str, "waited": (int, float), "applied": bool, "logged": bool},
    "validation": {"step": int, "seconds": (int, float)},
    "save": {"step": int, "seconds": (int, float)},
    "end": {},
}
"""The types of an event's values, by its kind."""


_ENDS: dict[int | None, str] = {
    0: "finished",
    EXIT_TRY_AGAIN: "stopped on request, with more to do",
    EXIT_HANG: "not finished: ended by a rank that died or stood still",
}
_CLOCKS_DIFFER = 1.0
"""Seconds by which the clocks of a cluster's machines may differ."""


@dataclass
class Event:
    """An event. line: its number in the file. order: the number of the order of samples then in force; -1 before the first.
    abandoned: true if what was done then was left behind later, or is not of the line for another reason. skipped: the
    stretches of rows that were then left out."""

    line: int
    time: float
    kind: str
    values: dict[str, Any]
    order: int = -1
    abandoned: bool = False
    skipped: tuple[Stretch, ...] = ()

    @property
    def step(self) -> int:
        return self.values.get("step", 0)


@dataclass
class Return:
    """Training went on from `step` after it had come to step `reached`. left_out: the rows that a rollback, after a loss spike,
    leaves out since; None where it was none."""

    step: int
    reached: int
    left_out: Stretch | None = None


@dataclass
class History:
    """A run's history.

    events: all, as they were written. line: the step events of the line, by their step. orders: the recorded orders of samples.
    returns: where training went on from an earlier step. problems, notes: a sentence each; what contradicts a sound run, and
    what is worth knowing.
    """

    events: list[Event] = field(default_factory=list)
    line: dict[int, Event] = field(default_factory=dict)
    orders: list[dict[str, Any]] = field(default_factory=list)
    returns: list[Return] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max(self.line, default=0)

    @property
    def left_out(self) -> tuple[Stretch, ...]:
        """The stretches of rows that the line leaves out."""
        return self.line[self.last_step].skipped if self.line else ()

    @property
    def starts(self) -> list[Event]:
        return [event for event in self.events if event.kind == "start"]

    @property
    def exit_code(self) -> int | None:
        """The exit code of the newest job, if it ended in good order."""
        for event in reversed(self.events):
            if event.kind in ("step", "start") or "code" in event.values:
                return event.values.get("code")
        return None

    @property
    def how_it_ended(self) -> str:
        """Describe the end of the newest job in a few words; one that was killed, or still runs, is "not finished"."""
        last = self.events[-1].values if self.events else {}
        if isinstance(last.get("error"), str):
            return f"not finished: ended by {last['error']}"
        return _ENDS.get(self.exit_code, "not finished")

    @property
    def steps(self) -> list[Event]:
        """All steps, abandoned ones included."""
        return [event for event in self.events if event.kind == "step"]


def read_history(run_dir: Path) -> History:
    """Read a run's events and follow them."""
    history = History()
    path = run_dir / EVENTS_FILE
    if not path.is_file():
        history.problems.append(f"{EVENTS_FILE}: there is none, so nothing is known of samples and time")
        return history
    _read_events(path, history)
    _Follower(history).follow()
    history.notes += _clocks_set_back(history.events)
    return history


def _read_events(path: Path, history: History) -> None:
    """Read whole lines. A torn one is what a kill leaves at the end of a job; anywhere else records are damaged."""
    torn: int | None = None
    for line in read_json_lines(path):
        event = _event(line.number, line.value)
        if torn is not None and (event is None or event.kind != "start"):
            history.problems.append(f"{EVENTS_FILE}: line {torn} is damaged, and what it told is not known")
            torn = None
        if event is None:
            torn = line.number
            continue
        if torn is not None:
            history.notes.append(f"{EVENTS_FILE}: line {torn} is torn, where a job was killed; it is left out")
            torn = None
        history.events.append(event)
    if torn is not None:
        history.notes.append(f"{EVENTS_FILE}: the last line is torn, as a kill leaves it; it is left out")


def _event(number: int, value: dict[str, Any] | None) -> Event | None:
    """An event of a known kind with all its values; None of any other line."""
    if value is None or not isinstance(value.get("time"), int | float) or not all(map(_is_possible, value.values())):
        return None
    kind = str(value.get("event"))
    types = _FIELDS.get(kind)
    if types is None or not all(isinstance(value.get(key), known) for key, known in types.items()):
        return None
    if not isinstance(value.get("code", 0), int):
        return None
    return Event(number, float(value["time"]), kind, value)


def _is_possible(value: Any) -> bool:
    """False for numbers that no run records, which sums would carry on."""
    return not isinstance(value, int | float) or 0 <= value < 2**53


def _clocks_set_back(events: Sequence[Event]) -> Iterator[str]:
    """Say where time went back: the clock was set, or is another machine's. Until it has caught up no time is counted."""
    for before, event in pairwise(events):
        if before.time - event.time > _CLOCKS_DIFFER:
            yield (
                f"{EVENTS_FILE}: line {event.line} is {before.time - event.time:.0f} s before the line above it by the clock; "
                "the shares of the wall clock lack that time"
            )


class _Follower:
    """Follows the events in their order. `at`: the step that training has come to; None before it has begun."""

    def __init__(self, history: History):
        self.history = history
        self.at: int | None = None
        self.samples = 0
        self.is_running = False
        # The stretches that are left out, those that were so where training went on from a step, and if it did so in this job.
        self.skipped: tuple[Stretch, ...] = ()
        self.begun_with: dict[int, list[tuple[Stretch, ...]]] = {0: [()]}
        self.has_begun = False

    def follow(self) -> None:
        for place, event in enumerate(self.history.events):
            event.order, event.skipped = len(self.history.orders) - 1, self.skipped
            if event.kind == "start":
                self._start(event)
            elif event.kind == "order":
                self.history.orders.append(event.values)
            elif event.kind == "resume":
                self._resume(event, self.history.events[:place])
            elif event.kind == "step":
                self._step(event)
            elif event.kind == "end":
                self.is_running = False

    def _start(self, event: Event) -> None:
        if self.is_running:
            self.history.notes.append(
                f"the job before line {event.line} ended without a word, after step {self.at or 0}: it was killed, or its "
                "machine was lost"
            )
        self.is_running, self.has_begun = True, False

    def _resume(self, event: Event, before: Sequence[Event]) -> None:
        line, step = self.history.line, event.step
        if self.at is not None and step > self.at:
            self._missing(self.at + 1, step)
        if self.at is None and step > 0:
            self._missing(1, step)
        if self.at is not None and step < self.at:
            self.history.returns.append(Return(step, self.at))
            for each in before:
                each.abandoned |= each.kind in ("step", "validation", "save") and each.step > step
            for later in [number for number in line if number > step]:
                del line[later]
        reached, self.at = self.at, step
        self._leave_out(event, reached)

        # The position in the data must be that of the step.
        known = line[step].values["samples"] if step in line else 0 if step == 0 else event.values["samples"]
        self._expect_samples(event, known)

    def _leave_out(self, event: Event, reached: int | None) -> None:
        """Take over what is left out: that of the step, and after a return within a job some more rows as well."""
        before, has_begun, self.has_begun = self.skipped, self.has_begun, True
        num_rows = self.history.orders[event.order]["global_batch"] if event.order >= 0 else 1
        try:
            self.skipped = tuple(checked_stretches(event.values.get("skipped", ()), max(1, num_rows)))
        except (TypeError, ValueError, OverflowError) as error:
            self._problem(event, f"the record of what is left out is damaged: {error}")
            return

        # A rollback, known by what it has added.
        line, step = self.history.line, event.step
        known = [*self.begun_with.get(step, ()), *([line[step].skipped] if step in line else ())]
        self.begun_with = {of: begun for of, begun in self.begun_with.items() if of <= step}
        self.begun_with.setdefault(step, []).append(self.skipped)
        added = added_stretch(before, self.skipped)
        if has_begun and added is not None and step * num_rows <= added.start < (reached or 0) * num_rows:
            self.history.returns[-1].left_out = Stretch(*(position_of(row, before) for row in added))
            return

        # Any other start leaves out what its step has left out, or one that went on from there.
        if known and self.skipped not in known:
            rows = ", ".join(f"{start} to {end - 1}" for start, end in self.skipped) or "none"
            self._problem(event, f"step {step} goes on without other rows than before ({rows}), and no rollback tells why")

    def _problem(self, event: Event, what: str) -> None:
        self.history.problems.append(f"{EVENTS_FILE}: line {event.line}: {what}")

    def _step(self, event: Event) -> None:
        if self.at is None:
            self.history.problems.append(f"{EVENTS_FILE}: line {event.line}: step {event.step}, where no start is recorded")
            self.at, self.samples = event.step - 1, event.values["samples"]
        elif event.step <= self.at:
            self.history.problems.append(
                f"{EVENTS_FILE}: line {event.line}: step {event.step} again, after step {self.at}: it is there twice"
            )
            event.abandoned = True
            return
        elif event.step > self.at + 1:
            self._missing(self.at + 1, event.step - 1)
        elif event.order >= 0:
            self._expect_samples(event, self.samples + self.history.orders[event.order]["global_batch"])
        self.at, self.samples = event.step, event.values["samples"]
        self.history.line[event.step] = event

    def _expect_samples(self, event: Event, expected: int) -> None:
        self.samples = found = event.values["samples"]
        if found != expected:
            self.history.problems.append(
                f"{EVENTS_FILE}: line {event.line}: step {event.step} stands at sample {found:,}, expected {expected:,}"
            )

    def _missing(self, first: int, last: int) -> None:
        steps = f"step {first} has" if first == last else f"steps {first} to {last} have"
        self.history.problems.append(f"{EVENTS_FILE}: {steps} no record")
