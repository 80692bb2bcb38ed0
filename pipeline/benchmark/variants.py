"""How things are measured: variants side by side, each in a process of its own, one round of all after another.

A process of its own gives every variant its own allocator and peak; going round by round lets whatever else the
machine does fall on all alike; medians forgive single disturbances. What a variant needs is made in its process, once,
and every round hands it fresh inputs. The first rounds only warm up.
"""

import contextlib
import ctypes
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.runtime.memory import current_bytes, peak_bytes, reset_peak

Round = Callable[[int], Any]
"""From a round's number to what the variant measured in it (anything that can be pickled)."""


def in_turn(prepare: Callable[..., Round], variants: Sequence[tuple[Any, ...]], num_rounds: int) -> list[list[Any]]:
    """For each variant what `prepare(*variant)`, called in a process of its own, measured in rounds 0, 1, ...

    `prepare` lives at the top of a module. A variant that fails fails the call, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        connections = []
        for variant in variants:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, prepare, variant), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            connections.append(ours)
        measured: list[list[Any]] = [[] for _ in variants]
        for number in range(num_rounds):
            for connection, variant, answers in zip(connections, variants, measured, strict=True):
                connection.send(number)
                answer, error = connection.recv()
                if error is not None:
                    raise RuntimeError(f"variant {variant[0]} failed in round {number}:\n{error}")
                answers.append(answer)
        return measured


def _work(connection: Connection, prepare: Callable[..., Round], variant: tuple[Any, ...]) -> None:
    run: Round | None = None
    while (number := connection.recv()) is not None:
        try:
            run = run or prepare(*variant)
            connection.send((run(number), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """(what `work` returns, its seconds, its peak memory above what was in use before it)."""
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
    """glibc keeps small freed blocks; kept ones would be in use before the work and hide what the work needs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def medians(values: Iterable[dict[str, float]], keys: Sequence[str]) -> dict[str, float]:
    rows = list(values)
    return {key: statistics.median(row[key] for row in rows) for key in keys}
