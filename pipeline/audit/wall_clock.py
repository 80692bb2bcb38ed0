"""Shares of a run's wall clock: the time from the beginning of its first job to its last event, cut at every event.

    productive   steps of the line that were applied, without their waits
    reference    the same of a reference that the run has trained for itself
    data_wait    waits of these steps for data
    saving       training stood still for a checkpoint
    evaluation   validations
    lost_work    all that was done after the checkpoint from which the run went on, and steps that were discarded
    restarts     from the end of a job's records to the beginning of the next, from the beginning of a job to its first step,
                 and from a loss spike to the return to a checkpoint
    other        the rest

The pieces are cut from one line of time, so they sum to all of it. The clock is the first rank's. What a killed job did after
its last event, a part of a step, counts as time without a job.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.audit.history import Event, History

KINDS = ("productive", "reference", "data_wait", "saving", "evaluation", "lost_work", "restarts", "other")


class WallClock(NamedTuple):
    """seconds: by kind. starting: the part of `restarts` in which a job was there and started."""

    seconds: dict[str, float]
    starting: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def percent(self) -> dict[str, float]:
        """Shares by kind, which sum to 100; all 0 of a run without time."""
        return {kind: 100 * seconds / self.total if self.total else 0.0 for kind, seconds in self.seconds.items()}


def wall_clock(history: History, reference: Sequence[Event] = ()) -> WallClock:
    """Sum up the time between events. reference: those of a reference that the run has trained, while its jobs started."""
    seconds = dict.fromkeys(KINDS, 0.0)
    starting, before, phase = 0.0, None, "training"
    for event, is_of_reference in _in_order(history.events, reference):
        if event.kind == "start" and not is_of_reference:
            # Time without a job, then the time that Python and libraries took to load.
            began = min(event.values["began"], event.time)
            seconds["restarts"] += 0.0 if before is None else max(0.0, began - before)
            before, phase = max(began, began if before is None else before), "starting"
        piece = max(0.0, event.time - (event.time if before is None else before))
        before = event.time if before is None else max(before, event.time)

        starting += piece if phase == "starting" else 0.0
        for kind, share in _shares(event, piece, phase).items():
            seconds[kind] += share
        phase = _phase_after(event, is_of_reference, phase)
    return WallClock(seconds, starting)


def _phase_after(event: Event, is_of_reference: bool, phase: str) -> str:
    """A job starts until its own training goes on, but for the time in which that of its reference does."""
    if event.kind == "start" or (event.kind == "end" and is_of_reference):
        return "starting"
    if event.kind in ("resume", "end"):
        return "reference" if is_of_reference else "training"
    return phase


def _in_order(events: Sequence[Event], reference: Sequence[Event]) -> Iterator[tuple[Event, bool]]:
    """Both lists as one, by time; each in the order in which it was written."""
    both = ([(event, is_of_reference) for event in each] for each, is_of_reference in ((events, False), (reference, True)))
    return heapq.merge(*both, key=lambda pair: pair[0].time)


def _shares(event: Event, piece: float, phase: str) -> dict[str, float]:
    """Share the seconds before an event among the kinds."""
    if phase == "starting":
        return {"restarts": piece}
    if event.abandoned or (event.kind == "step" and not event.values["applied"]):
        return {"lost_work": piece}
    if event.kind == "step":
        waited = min(piece, event.values["waited"])
        return {"reference" if phase == "reference" else "productive": piece - waited, "data_wait": waited}
    if event.kind in ("save", "validation"):
        stood_still = min(piece, event.values["seconds"])
        return {"saving" if event.kind == "save" else "evaluation": stood_still, "other": piece - stood_still}
    return {"restarts" if event.kind == "resume" else "other": piece}
