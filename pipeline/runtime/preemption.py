"""Asking a run to stop: SIGTERM, SIGUSR1 or a file STOP in the run directory.

A request only sets a flag. The ranks agree on it at the end of a step, save a checkpoint together and exit with
`EXIT_TRY_AGAIN` when there is more to do, so that a scheduler knows to start the job again.
"""

import signal
from pathlib import Path
from types import FrameType

import torch

from pipeline.runtime.distributed import World, any_rank

EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request, run the same command again."""


class StopRequest:
    def __init__(self, run_dir: Path, world: World):
        self.file = run_dir / "STOP"
        self.watches_file = world.is_first
        self.signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank calls this at the end of every step."""
        return any_rank(self.signalled or (self.watches_file and self.file.exists()), device)

    def obeyed(self) -> None:
        if self.watches_file:
            self.file.unlink(missing_ok=True)
