"""Faults on request: at a point of the training, on a rank, in a step, something happens.

The package knows nothing of it, so it costs nothing there. `inject` wraps the function that lies at the point, in the process
of a rank before it runs the command. A fault happens once in the life of a process.
"""

import errno
import functools
import importlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import get_worker_info

DELAY_SECONDS = 3.0


class Fault(NamedTuple):
    """`kind` happens to `rank` when it comes to `point`, in training step `step` or the first later one that has the point.
    Step 0 is the start."""

    point: str
    kind: str
    rank: int
    step: int

    def __str__(self) -> str:
        return f"{self.kind} {self.point}, rank {self.rank}, step {self.step}"


class Place(NamedTuple):
    """A function, as `module:attribute.path`; the point lies before its call, or after it. file: the name of the file that its
    first argument must be. in_worker: called in a loader's worker process."""

    function: str
    is_after: bool = False
    file: str = ""
    in_worker: bool = False


_COMMIT, _RESUME = "pipeline.runtime.checkpoint.commit", "pipeline.runtime.checkpoint.checkpoints"

IN_A_STEP = {
    "in the loader": Place("pipeline.storage.files:LocalFile.read"),
    "before the forward": Place("pipeline.train:comparisons"),
    "in the exchange": Place("pipeline.weighting.exchange:all_gather"),
    "between micro-steps": Place("pipeline.train:end_micro_step", is_after=True),
    "after the update": Place("pipeline.train:advance"),
}
IN_A_SAVE = {
    "before a rank's file": Place(f"{_COMMIT}:write_tensors"),
    "in a rank's file": Place("pipeline.runtime.checkpoint.fragment_file:_bytes_of"),
    "after a rank's file": Place(f"{_COMMIT}:write_tensors", is_after=True),
}
"""In the thread that writes a checkpoint, of each rank."""
IN_A_COMMIT = {
    "before state.json": Place(f"{_COMMIT}:write_file", file="state.json"),
    "after state.json": Place(f"{_COMMIT}:write_file", is_after=True, file="state.json"),
    "before the rename": Place(f"{_COMMIT}:publish"),
    "after the rename": Place(f"{_COMMIT}:publish", is_after=True),
    "after latest": Place(f"{_COMMIT}:write_file", is_after=True, file="latest"),
}
"""In that thread of the first rank."""
IN_A_RESUME = {
    "in a checkpoint's file": Place("pipeline.runtime.checkpoint.read:read_pieces"),
    "after a checkpoint was loaded": Place(f"{_RESUME}:load", is_after=True),
    "before the records are cut": Place("pipeline.reporter:Logbook"),
    "after the records were cut": Place("pipeline.reporter:Logbook", is_after=True),
}
"""At a start that continues a run; the records are the first rank's."""
IN_A_WORKER = {"in a loader's worker": Place("pipeline.storage.files:LocalFile.read", in_worker=True)}

POINTS = IN_A_STEP | IN_A_SAVE | IN_A_COMMIT | IN_A_RESUME | IN_A_WORKER


def _fail(number: int) -> None:
    raise OSError(number, os.strerror(number), "a file")


def _raise() -> None:
    raise RuntimeError("an error that a test asked for")


KINDS: dict[str, Callable[[], None]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "exception": _raise,
    "delay": lambda: time.sleep(DELAY_SECONDS),
    "disk full": lambda: _fail(errno.ENOSPC),
    "EIO": lambda: _fail(errno.EIO),
}


class Injector:
    """Has a fault happen once, in the step that it names."""

    def __init__(self, fault: Fault):
        self.fault = fault
        self.step = 0
        self._has_happened = False
        self._lock = threading.Lock()

    def enter(self, run: Any, fetched: Any, progress: Any) -> None:
        """Be in the step after those that are done."""
        self.step = progress.step + 1

    def reach(self, *arguments: Any) -> None:
        """Be at the point."""
        with self._lock:
            happens = self.step >= self.fault.step and not self._has_happened
            self._has_happened |= happens
        if happens:
            print(f"injected: {self.fault}", flush=True)
            KINDS[self.fault.kind]()


def inject(rank: int, patch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Have a fault happen to this process, if it is the rank's."""
    if rank == fault.rank:
        injector = Injector(fault)
        _wrap(patch, Place("pipeline.train:train_step"), injector.enter)
        _wrap(patch, POINTS[fault.point], injector.reach)


def _wrap(patch: pytest.MonkeyPatch, place: Place, happen: Callable[..., None]) -> None:
    """Call `happen` with the arguments of the place's function, before or after each call."""
    owner, name = _owner(place.function)
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        is_there = not place.file or Path(arguments[0]).name == place.file
        is_there &= place.in_worker == (get_worker_info() is not None)
        if is_there and not place.is_after:
            happen(*arguments)
        result = original(*arguments, **named)
        if is_there and place.is_after:
            happen(*arguments)
        return result

    patch.setattr(owner, name, call)


def _owner(function: str) -> tuple[Any, str]:
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def poison(rank: int, patch: pytest.MonkeyPatch, what: str, victim: int, steps: Sequence[int]) -> None:
    """Have the policy's losses, or only their gradient, be NaN in one row of a rank's micro-batches in these steps."""
    from pipeline.model.mtp import MTPModel

    injector, original = Injector(Fault("", "", victim, 0)), MTPModel.hidden_states

    def hidden_states(*arguments: Any, **named: Any) -> torch.Tensor:
        hidden_BTHD: torch.Tensor = original(*arguments, **named)
        if rank == victim and injector.step in steps and hidden_BTHD.requires_grad:
            factor_BTHD = torch.ones_like(hidden_BTHD)
            factor_BTHD[0] = torch.nan
            if what == "loss":
                return hidden_BTHD * factor_BTHD
            hidden_BTHD.register_hook(lambda gradient_BTHD: gradient_BTHD * factor_BTHD)
        return hidden_BTHD

    _wrap(patch, Place("pipeline.train:train_step"), injector.enter)
    patch.setattr(MTPModel, "hidden_states", hidden_states)


def leave_out(rank: int, patch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """Have these steps consume their samples, and do nothing else: no forward, no backward, no update."""
    from pipeline import train
    from pipeline.run import StepResult
    from pipeline.runtime.metrics import SelectionSums
    from pipeline.schedule import learning_rate

    original = train.train_step

    def train_step(run: Any, fetched: Any, progress: Any) -> StepResult:
        if progress.step + 1 not in steps:
            return original(run, fetched, progress)
        counted = fetched.pending.read()
        sums = SelectionSums(run.settings.model.num_prediction_heads, len(counted.consumed.tokens_by_source), run.device)
        rate = learning_rate(run.settings.training, progress.applied_steps)
        nothing = torch.tensor(math.nan)
        return StepResult(counted.counts, counted.consumed, [], sums, nothing, None, rate, applied=False, bad="left out")

    patch.setattr(train, "train_step", train_step)


def poison_and_kill(rank: int, patch: pytest.MonkeyPatch, what: str, victim: int, steps: Sequence[int], fault: Fault) -> None:
    """Both `poison` and `inject`."""
    poison(rank, patch, what, victim, steps)
    inject(rank, patch, fault)
