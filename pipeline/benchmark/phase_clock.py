"""A clock of the phases of a step, which waits for the device wherever a phase changes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


class PhaseClock:
    """Seconds by phase; of nested phases the time goes to the innermost. The device is waited for wherever a phase changes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.since = 0.0

    def enter(self, name: str) -> None:
        """Begin a phase within the one that runs."""
        self._account()
        self.open.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self._account()
        self.open.pop()

    def entering(self, name: str) -> Callable[..., None]:
        """A hook that begins a phase."""
        return lambda *_: self.enter(name)

    def leaving(self, *_: Any) -> None:
        """End the innermost phase, as a hook."""
        self.leave()

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function as a phase."""

        def timed(*arguments: Any, **more: Any) -> Any:
            self.enter(name)
            try:
                return work(*arguments, **more)
            finally:
                self.leave()

        return timed

    def _account(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now
