"""Keep what torch's flight recorder knows of a rank's last collectives, when a job ends because a rank died or stands still.

The recorder is a ring buffer in torch: name, sizes and state of each of the last collectives, of NCCL and gloo alike. Compared
over ranks, the files show the first one that not all ranks have reached. They are JSON; torch's other form is a pickle.
"""

import faulthandler
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.storage.whole_file import write_file

FOLDER = "flight_recorder"
"""Folder of a run directory with one file a rank: `rank-00000.json`."""

FORMER = f"{FOLDER}-before"
"""The same of an earlier job, once another one has begun."""

_COLLECTIVES_KEPT = "2000"
_SECONDS_FOR_EXIT = 10.0


def record() -> None:
    """Have torch record collectives; called before the process group is there. A user's own setting stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _COLLECTIVES_KEPT)


def set_former_aside(run_dir: Path) -> None:
    """Rename what an earlier job of this run has left, so that the files of two jobs are not compared as one's."""
    former = run_dir / FORMER
    # A record of the past is no reason not to train.
    with suppress(OSError):
        if (run_dir / FOLDER).exists():
            shutil.rmtree(former, ignore_errors=True)
            os.replace(run_dir / FOLDER, former)


def write(run_dir: Path, rank: int, seconds: float) -> None:
    """Write this rank's record to the run directory, or give up after `seconds`. The process is about to end.

    The recorder is asked in a thread of its own, because the collective that hangs may hold it.
    """
    # If torch even keeps Python from going on, what needs no Python ends the process.
    faulthandler.dump_traceback_later(seconds + _SECONDS_FOR_EXIT, exit=True)
    thread = threading.Thread(target=_write, args=(run_dir / FOLDER / f"rank-{rank:05d}.json",), daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def _write(path: Path) -> None:
    # The job ends all the same where there is no such recorder, no group, or no space.
    with suppress(Exception):
        content = _dump()()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)


def _dump() -> Callable[[], bytes]:
    """The function of this torch that returns the record of the process group's backend as JSON."""
    c10d: Any = torch._C._distributed_c10d
    return c10d._dump_nccl_trace_json if dist.get_backend() == "nccl" else c10d._dump_fr_trace_json
