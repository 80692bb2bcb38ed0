"""Times of variants that take turns, round by round, and peak memory.

Going round by round lets whatever else the machine does fall on all variants alike; medians forgive single disturbances. The
first rounds only warm up: whoever asks for the rounds drops them. A variant that needs its own allocator and peak gets a
process of its own (`in_processes`), where what it needs is made once.
"""

import contextlib
import ctypes
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.benchmark.attempts import reason_of, say
from pipeline.benchmark.child_process import Child, ChildDiedError, answer
from pipeline.runtime.memory import current_bytes, peak_bytes, reset_peak

Round = Callable[[int], Any]
"""From a round's number to what the variant measured in it (from a process of its own: anything that can be pickled)."""


class VariantError(RuntimeError):
    """A variant's process failed or died. reason: the same in one line."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def in_turn(
    variants: Mapping[str, Round], num_rounds: int, failed: dict[str, str] | None = None, needed: str | None = None
) -> dict[str, list[Any]]:
    """Return for each variant what it measured in rounds 0, 1, ..., of which each is run by all before the next begins.

    failed: takes the reason of a variant that fails, which is left out then; None: its `VariantError` is raised, as that of the
    variant `needed` always is.
    """
    measured: dict[str, list[Any]] = {name: [] for name in variants}
    for number in range(num_rounds):
        for name in list(measured):
            try:
                measured[name].append(variants[name](number))
            except VariantError as error:
                if failed is None or name == needed:
                    raise
                say(str(error))
                failed[name] = error.reason
                del measured[name]
    return measured


def stopwatch(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> Round:
    """Return a round that measures the seconds of `work`; `before` precedes it, uncounted."""

    def measured(number: int) -> float:
        before()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return measured


@contextmanager
def in_processes(prepare: Callable[..., Round], variants: Sequence[tuple[Any, ...]]) -> Iterator[dict[str, Round]]:
    """Start a process for each variant, named by its first element, and give rounds of `prepare(*variant)` made there.

    `prepare` lives at the top of a module. Such a round raises RuntimeError where the variant's process fails (with its
    traceback) or dies (with its exit code, as where memory ran out): a `VariantError`.
    """
    with ExitStack() as stack:
        children = {variant[0]: stack.enter_context(Child(variant[0], _serve, prepare, variant)) for variant in variants}
        yield {name: partial(_round_of, child) for name, child in children.items()}
        for child in children.values():
            with contextlib.suppress(BrokenPipeError):  # It may have died.
                child.connection.send(None)


def measured_in_processes(
    prepare: Callable[..., Round], variants: Sequence[tuple[Any, ...]], num_rounds: int
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return what each variant measured in a process of its own, and why others measured nothing.

    They take turns; on CUDA they follow one another, because the device's memory holds only one. The first one is what the
    others are compared with, so its failure is raised.
    """
    measured: dict[str, list[Any]] = {}
    failed: dict[str, str] = {}
    groups = [[variant] for variant in variants] if torch.cuda.is_available() else [variants]
    for group in groups:
        with in_processes(prepare, group) as rounds_of:
            measured |= in_turn(rounds_of, num_rounds, failed, needed=variants[0][0])
    return measured, failed


def _round_of(child: Child, number: int) -> Any:
    """Have a variant's process run a round."""
    try:
        child.connection.send(number)
        measured, error = child.receive()
    except (ChildDiedError, BrokenPipeError) as death:
        reason = f"died in round {number}: {child.ending()}"
        raise VariantError(f"variant {child.name} {reason}", reason) from death
    if error is not None:
        reason, stack = error
        raise VariantError(f"variant {child.name} failed in round {number}:\n{stack}", reason)
    return measured


def _serve(parent: Connection, prepare: Callable[..., Round], variant: tuple[Any, ...]) -> None:
    """Run the rounds that the parent asks for."""
    run: Round | None = None
    while (number := parent.recv()) is not None:
        try:
            run = run or prepare(*variant)
            answer(parent, (run(number), None))
        except Exception as error:
            answer(parent, (None, (reason_of(error), traceback.format_exc())))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """Return what `work` returns, its seconds, and its peak memory above what was in use before it."""
    # Nothing of what came before is counted.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        _return_freed_memory()
    reset_peak(device)
    before = current_bytes(device)

    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started, max(0, peak_bytes(device) - before)


def _return_freed_memory() -> None:
    """Give small freed blocks, which glibc keeps, back: they would be in use before the work and hide what it needs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def medians(values: Iterable[dict[str, float]], keys: Sequence[str]) -> dict[str, float]:
    """Return the median of each key over all rounds."""
    rows = list(values)
    return {key: statistics.median(row[key] for row in rows) for key in keys}


def slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Return for each run the seconds of the rank that took longest: no step ends before it."""
    return [max(seconds) for seconds in zip(*of_ranks, strict=True)]


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the runs' ratios, so that each compares what was measured side by side."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))
