"""A clock of the phases of a step, which waits for the device wherever a phase changes.

data       fetching the next step, and counting its pairs
reference  the reference's forward
blocks     the policy's forward up to the hidden states
loss       the loss phase with its gradients, but for what follows
exchange   the exact selection among the losses, with its collectives
backward   from the hidden states back
optimizer  the gradients' norm and the update
other      what lies between
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pipeline.benchmark.stepping import TrainingSteps
from pipeline.weighting.selection import Selection, Selector
from pipeline.weighting.selectors import EveryPair

PHASES = ("data", "reference", "blocks", "loss", "exchange", "backward", "optimizer", "other")


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


class _ClockedSelector:
    """A selector whose selection is the phase `exchange`."""

    def __init__(self, selector: Selector, clock: PhaseClock) -> None:
        self.selector, self.clock = selector, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.selector, name)

    def after_first_head(self, first_loss_BT: Tensor) -> "_ClockedSelector":
        return _ClockedSelector(self.selector.after_first_head(first_loss_BT), self.clock)

    def select(self, policy_loss_BTK: Tensor) -> Selection:
        selection: Selection = self.clock.around("exchange", self.selector.select)(policy_loss_BTK)
        return selection


def seconds_by_phase(take_step: TrainingSteps) -> dict[str, float]:
    """Take a step, and return its seconds by phase; a phase that the step does not have is left out."""
    run = take_step.run
    clock = PhaseClock(run.device)
    policy, reference = run.engine, run.models.reference

    def with_clocked_selector(_: Any, inputs: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # What takes every pair exchanges nothing.
        selector = more["selector"]
        return inputs, more if isinstance(selector, EveryPair) else more | {"selector": _ClockedSelector(selector, clock)}

    with ExitStack() as stack:
        hooked: list[tuple[str, Any]] = [("blocks", policy), ("loss", policy.module.unembed)]
        hooked += [] if reference is None else [("reference", reference)]
        for name, module in hooked:
            stack.callback(module.register_forward_pre_hook(clock.entering(name)).remove)
            stack.callback(module.register_forward_hook(clock.leaving).remove)
        stack.callback(policy.register_forward_pre_hook(with_clocked_selector, with_kwargs=True).remove)

        calls = [("data", take_step, "fetch"), ("backward", policy, "backward"), ("optimizer", policy, "step")]
        for name, owner, method in calls:
            stack.callback(setattr, owner, method, getattr(owner, method))
            setattr(owner, method, clock.around(name, getattr(owner, method)))
        clock.around("other", take_step)()
    return dict(clock.seconds)
