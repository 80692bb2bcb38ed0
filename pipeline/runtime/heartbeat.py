"""Notice a rank that has died or stands still, name it, and end the job: no rank waits for another without end.

The heartbeat of this process, which its main loop tells what it does (`rank_watch` has how ranks are watched). Nothing of a job
waits for longer than a phase's patience: `run.hang_timeout`, or `UNWATCHED` where that is null, in a phase that takes longer
`rank_watch.LONGER` times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pipeline.runtime import flight_recorder
from pipeline.runtime.distributed import World
from pipeline.runtime.rank_watch import LONGER, RankWatch

UNWATCHED = 6 * 3600.0
"""Seconds for which a step may stand still where `run.hang_timeout` is null; a longer phase a day."""

_LONGEST_COLLECTIVE = timedelta(minutes=10)
_OF_A_PEER = ("gloo", "NCCL", "Connection", "Broken pipe")


_current: RankWatch | None = None


def begin(world: World, timeout: float | None, run_dir: Path | None = None) -> None:
    """Start this process's heartbeat, once the process group is there. timeout: `run.hang_timeout`; None: a step may take
    `UNWATCHED`, and only a process that died is noticed soon."""
    global _current
    if run_dir is not None and world.is_first:
        flight_recorder.set_former_aside(run_dir)
    store = dist.distributed_c10d._get_default_store()
    _current = RankWatch(world, store, timeout or UNWATCHED, run_dir)
    _current.start()


def stop() -> None:
    """Stop this process's heartbeat, if there is one."""
    global _current
    if _current is not None:
        _current.stop()
    _current = None


def wait_for_verdict() -> None:
    """After a collective that failed: wait a little for what is known of the peers, which ends this process.

    Returns if nothing is.
    """
    if _current is not None:
        _current.wait_for_verdict()


def is_of_a_peer(error: BaseException) -> bool:
    """True if a collective failed, because another rank is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_A_PEER)


@contextmanager
def telling_of_errors(alike: tuple[type[Exception], ...]) -> Iterator[None]:
    """Tell the other ranks of an error that ends this one alone, so that they end and name it.

    alike: errors that all ranks raise alike, as those do that are `agreed`.
    """
    try:
        yield
    except alike:
        raise
    except Exception as error:
        if _current is not None and not getattr(error, "agreed", False) and not is_of_a_peer(error):
            _current.end_with(error)
        raise


def enter(phase: str, step: int = 0) -> None:
    """Say what the main loop of this process begins to do; without effect where nothing watches."""
    if _current is not None:
        _current.enter(phase, step)


def go_on() -> None:
    """Say that the main loop gets on in the phase that it is in, which may take as long as there is something to do."""
    if _current is not None:
        _current.enter(*_current.phase)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Be in a phase for the length of a `with`, and after it in the one before, begun anew."""
    before = _current.phase if _current is not None else ("", 0)
    enter(phase)
    try:
        yield
    finally:
        enter(*before)


def longest_collective(timeout: float | None) -> timedelta:
    """The process group's own timeout: longer than any patience of ours, so that ranks are named, unless nothing is watched.

    timeout: `run.hang_timeout`.
    """
    return _LONGEST_COLLECTIVE if timeout is None else _LONGEST_COLLECTIVE + timedelta(seconds=(LONGER + 1) * timeout)
