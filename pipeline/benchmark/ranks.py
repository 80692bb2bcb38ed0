"""A plain function on several ranks of this machine, each a gloo process of its own.

When a rank fails, its peers fail after it, because their connections to it break. `run_ranks` names the rank that was first:
one that died without a word before those that raised, and of these the one with the earliest time of the machine's clock.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.benchmark.child_process import Child, ChildDiedError, answer, stacks_of

_SECONDS_FOR_THE_CAUSE = 0.5
"""Seconds after a failure in which others are heard: a rank's death may be seen after the errors of its peers."""


class RankError(RuntimeError):
    """A rank raised, died or was late."""


class _Answer(NamedTuple):
    """`traceback` of what the function raised, None where it returned `result`; `seconds` of the machine's monotonic clock."""

    result: Any
    traceback: str | None
    seconds: float


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Return [function(*arguments) on rank 0, on rank 1, ...], each a gloo process of its own with one thread.

    The function must live at the top of a module.

    Raises:
        RankError: a rank raised (with its traceback), died (with its exit code), or has not answered after `timeout` seconds
            (with the stacks of its threads). All others are killed.
    """
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        ranks = [
            stack.enter_context(Child(f"rank {rank}", _run_rank, function, rank, world_size, directory, arguments))
            for rank in range(world_size)
        ]
        results = _results(ranks, time.monotonic() + timeout, timeout)
        return [results[rank] for rank in ranks]


def _results(ranks: Sequence[Child], deadline: float, timeout: float) -> dict[Child, Any]:
    """Collect what each rank returns, in the order in which they answer."""
    results: dict[Child, Any] = {}
    while waited := [rank for rank in ranks if rank not in results]:
        ready = _ready(waited, deadline)

        # Nobody has anything to say: the rest is late.
        if not ready:
            late = ", ".join(rank.name for rank in waited)
            raise RankError(f"no answer within {timeout:g} seconds from {late}\n{stacks_of(waited)}")

        for rank in ready:
            result, failure = _heard(rank)
            if failure is not None:
                raise RankError(_cause({rank: failure}, [other for other in waited if other not in (rank, *results)]))
            results[rank] = result
    return results


def _ready(ranks: Sequence[Child], deadline: float) -> list[Child]:
    """Wait until some of the ranks have answered or died, and return them; none after the deadline."""
    ready = wait([rank.connection for rank in ranks], timeout=max(0, deadline - time.monotonic()))
    return [rank for rank in ranks if rank.connection in ready]


def _heard(rank: Child) -> tuple[Any, tuple[float, str] | None]:
    """Receive a rank's answer: what it returned, and when and how it failed. A death counts as earlier than any error."""
    try:
        received: _Answer = rank.receive()
    except ChildDiedError as error:
        return None, (0.0, str(error))
    if received.traceback is None:
        return received.result, None
    return None, (received.seconds, f"{rank.name} failed:\n{received.traceback}")


def _cause(failures: dict[Child, tuple[float, str]], others: Sequence[Child]) -> str:
    """Return the first failure in full, of those that are known and those that are heard within a moment."""
    deadline = time.monotonic() + _SECONDS_FOR_THE_CAUSE
    remaining = list(others)
    while remaining and (ready := _ready(remaining, deadline)):
        for rank in ready:
            remaining.remove(rank)
            if (failure := _heard(rank)[1]) is not None:
                failures[rank] = failure

    first, *later = sorted(failures, key=lambda rank: failures[rank][0])
    followed = f"\n(after it failed {', '.join(rank.name for rank in later)})" if later else ""
    return failures[first][1] + followed


def _run_rank(
    parent: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    directory: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
        answer(parent, _Answer(function(*arguments), None, time.monotonic()))
    except BaseException:
        answer(parent, _Answer(None, traceback.format_exc(), time.monotonic()))
        return

    # Peers may still be at work with this rank's connections; one that fails says so itself.
    with suppress(Exception):
        dist.barrier()
        dist.destroy_process_group()
