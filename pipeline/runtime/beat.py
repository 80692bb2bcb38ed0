"""A beat: what a rank tells the others of itself."""

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from pipeline.processes import Process


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    pid, started: of its process, which together name it. since: seconds in this phase. where: the main thread's function.
    waits: true if that waits in a collective for other ranks.
    """

    host: str
    pid: int
    started: int
    phase: str
    step: int
    since: float
    where: str
    waits: bool
    number: int

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started)


def named(rank: int, beat: Beat) -> str:
    """Name a rank, its machine and its process."""
    return f"rank {rank} on {beat.host} (process {beat.pid})"


def doing(beat: Beat) -> str:
    """Name the phase of a rank, and its step while it trains."""
    return f"{beat.phase} step {beat.step}" if beat.phase == "training" else f"phase {beat.phase!r}"


def main_thread() -> tuple[str, bool]:
    """Return the function that the main thread is in, and true if it waits in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no function", False
    code = frame.f_code
    where = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
    # ZeRO waits for its handles itself, in compiled code.
    waits = "/deepspeed/runtime/zero/" in code.co_filename
    while frame is not None and not waits:
        waits = "/torch/distributed/" in frame.f_code.co_filename or "/deepspeed/comm/" in frame.f_code.co_filename
        frame = frame.f_back
    return where, waits
