"""One job a run directory: two would write over each other's metrics and checkpoints.

The lock is the operating system's on a file in the run directory, held for as long as the process lives, so a killed job
leaves none behind. It reaches as far as the file system carries locks; where it carries none, nothing is refused.
"""

import os
import socket
from pathlib import Path
from typing import TextIO

from pipeline.storage.locks import take_lock_of_process


class RunLock:
    """Held by the first rank from `take` until `release`, or the end of its process."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / ".lock"
        self._file: TextIO | None = None

    def take(self) -> str | None:
        """None, or who holds the lock. Makes the run directory."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        # Not `take_lock`: loader workers would inherit it, and hold it for a while after a rank was killed.
        if not take_lock_of_process(self._file):
            self._file.seek(0)
            return self._file.read().strip()
        self._file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}\n")
        self._file.flush()
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
