"""Loss spikes: how far a step's loss, and the norm of its gradient, lie above those of the steps before it.

    score = (newest − mean) / standard deviation        both of the `WINDOW` applied steps before the newest

OLMo-core's optimizers skip an update by this score (`SkipStepOptimizer`; a window of 128 steps, no judgement before half of it
is full, outliers beyond 6), and OLMo 2 (arXiv 2501.00656) counts spikes by such a score, in a window of 1,000 and beyond 7.
An update that is not applied counts in no window.

The losses are of all ranks and the same on each, and checkpoints hold the windows, so every rank has the same scores, and a run
that is continued has those of one that was not interrupted, to the bit.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 128
"""Steps that the newest one is compared with."""
FEWEST = WINDOW // 2
"""Steps without which there is no score."""


class Recent:
    """The newest value of a quantity and the `WINDOW` values before it. A value stays on its device until it is needed."""

    def __init__(self, values: Sequence[float] = ()):
        self._values: list[float | Tensor] = list(values)

    def add(self, value: float | Tensor) -> None:
        """Add the newest value, a number or a scalar tensor; nothing waits for the device."""
        self._values = [*self._values[-WINDOW:], value.detach().clone() if isinstance(value, Tensor) else value]

    def numbers(self) -> list[float]:
        """Return the values, the newest last; the host waits for the device if it has not yet had them all."""
        waiting = [value for value in self._values if isinstance(value, Tensor)]
        if waiting:
            arrived = iter(torch.stack(waiting).tolist())
            self._values = [next(arrived) if isinstance(value, Tensor) else value for value in self._values]
        return [float(value) for value in self._values]

    def score(self) -> float | None:
        """Standard deviations by which the newest value exceeds the mean of those before it; None while there are fewer than
        `FEWEST` of these, or where they are all equal."""
        *before, newest = self.numbers() or [0.0]
        if len(before) < FEWEST:
            return None
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in before) / (len(before) - 1))
        return (newest - mean) / deviation if deviation else None
