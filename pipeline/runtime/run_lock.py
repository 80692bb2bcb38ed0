"""Lock a run directory, so that two jobs do not overwrite each other's metrics and checkpoints.

The lock is an operating system's file lock, held as long as the process lives, so a killed job leaves no stale lock. It covers
other machines where the file system supports locks; where it does not, nothing is refused.
"""

import os
import socket
from pathlib import Path
from typing import TextIO

from pipeline.storage.locks import take_lock_of_process


class RunLock:
    """The lock of one run directory, held by the first rank from `take` until `release` or the end of its process."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / ".lock"
        self._file: TextIO | None = None

    def take(self) -> str | None:
        """Take the lock and return None, or return a description of its holder. Creates the run directory."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        # Not `take_lock`: loader workers would inherit that lock and hold it for a while after the rank was killed.
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
