"""Asking a run to stop: SIGTERM, SIGUSR1 or a file STOP in the run directory.

A request only sets a flag. The ranks agree on it at the end of a step, save a checkpoint together and exit with
`EXIT_TRY_AGAIN` when there is more to do, so that a scheduler knows to start the job again. Loading torch and DeepSpeed
takes seconds in which a signal would end the process: so this module imports neither, and a job listens before it loads
them.
"""

import signal
from pathlib import Path
from types import FrameType

EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request, run the same command again."""


class StopRequest:
    """Listens from its construction on; signals are taken by every process, the file (once `watch` named it) by one."""

    def __init__(self) -> None:
        self._signalled = False
        self._file: Path | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def watch(self, run_dir: Path) -> None:
        """Heed the file STOP in `run_dir` too."""
        self._file = run_dir / "STOP"

    @property
    def is_made(self) -> bool:
        """Whether this process was asked to stop; what the ranks do about it they have to agree on."""
        return self._signalled or (self._file is not None and self._file.exists())

    def clear(self) -> None:
        """Remove the file: the request was obeyed, or the job has ended."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
