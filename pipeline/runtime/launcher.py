"""End a rank whose launcher is gone: nobody is left to end it, and it would hold its GPU and the run directory.

A launcher that is killed by SIGKILL, or by the kernel for want of memory, does not take its ranks along. So each rank remembers
the processes above it up to its launcher, and looks at them every second:

    deepspeed    rank ← deepspeed.launcher.launch ← deepspeed, the runner (on a further machine without the runner)
    torchrun     rank ← torchrun
    srun         rank ← slurmstepd

If one is gone, the rank asks itself to stop, as a signal would: the ranks save together and exit with 75. What has not ended
`SECONDS_TO_STOP` later exits with 4, wherever it stands. A job that no launcher started may outlive whoever did: its shell.
"""

import itertools
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline import processes
from pipeline.processes import Process
from pipeline.runtime import events
from pipeline.runtime.preemption import EXIT_HANG, StopRequest

SECONDS_TO_STOP = 20.0
"""Time that ranks have to save after their launcher is gone."""

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_NOTE = 2.0
_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun"}
_MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
_FURTHEST = 8

_gone = threading.Event()


def is_first_rank() -> bool:
    """Return whether this process is a job's first, by what a launcher or srun has put into the environment."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def watch(stop: StopRequest) -> None:
    """Watch this process's launcher, if it has one, from a thread."""
    chain = launcher_chain(processes.find(os.getpid()))
    if chain:
        threading.Thread(target=_watch, args=(chain, stop), name="launcher", daemon=True).start()


def is_gone() -> bool:
    """True once this process's launcher was seen to be gone: the process ends within `SECONDS_TO_STOP`."""
    return _gone.is_set()


def launcher_chain(process: Process) -> list[Process]:
    """List the processes above this one, from its parent to the top of its launcher; empty if no launcher started it."""
    chain: list[Process] = []
    length = 0
    above = process.parent
    while above is not None and len(chain) < _FURTHEST:
        chain.append(above)
        if _is_launcher(above.command):
            length = len(chain)
        elif length:
            break
        above = above.parent
    return chain[:length]


def _is_launcher(command: Sequence[str]) -> bool:
    """True for `python …/deepspeed …`, `python -u -m torch.distributed.run …`, `slurmstepd: [123.0]`."""
    first = command[:4]
    return (
        any(Path(word).name in _PROGRAMS for word in first)
        or any(before == "-m" and word in _MODULES for before, word in itertools.pairwise(first))
        or bool(first and Path(first[0].partition(":")[0]).name == "slurmstepd")
    )


def _watch(chain: Sequence[Process], stop: StopRequest) -> None:
    while all(process.is_alive for process in chain):
        time.sleep(_SECONDS_BETWEEN_LOOKS)

    _gone.set()
    rank = f"rank {os.environ.get('RANK', '0')}"
    gone = next((process.pid for process in chain if not process.is_alive), 0)
    _say(f"{rank}: its launcher is gone (process {gone}); the job saves what it has, and ends")
    stop.request()
    time.sleep(SECONDS_TO_STOP)
    _say(f"{rank}: could not stop within {SECONDS_TO_STOP:g} s after its launcher was gone; it ends as it stands")
    events.note_end(EXIT_HANG, _SECONDS_TO_NOTE)
    processes.kill_children()
    os._exit(EXIT_HANG)


def _say(text: str) -> None:
    # One write, so that the lines of two ranks stay two; whoever read them may be gone too.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
