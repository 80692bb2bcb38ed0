"""Requests to stop a run: SIGTERM, SIGUSR1, or a file STOP in the run directory.

A request only sets a flag. The ranks agree on it at the end of a step, save a checkpoint together and exit with
`EXIT_TRY_AGAIN` if there is more to do, so that a scheduler knows to start the job again.

This module imports neither torch nor DeepSpeed. Loading them takes seconds, in which an unhandled signal would kill the
process, so a job installs the handlers first.
"""

import signal
from pathlib import Path
from types import FrameType

EXIT_TRY_AGAIN = 75
"""Exit code EX_TEMPFAIL of sysexits.h: stopped on request; run the same command again to continue."""


class StopRequest:
    """Listens for requests from its construction on: every process for signals, the one that calls `watch` for the file too."""

    def __init__(self) -> None:
        self._signalled = False
        self._file: Path | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def watch(self, run_dir: Path) -> None:
        """Also look for a file STOP in `run_dir`."""
        self._file = run_dir / "STOP"

    @property
    def is_requested(self) -> bool:
        """True if this process was asked to stop. It says nothing of other ranks: they have to agree before they act."""
        return self._signalled or (self._file is not None and self._file.exists())

    def clear(self) -> None:
        """Remove the STOP file, once the request was obeyed or the job has ended."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
