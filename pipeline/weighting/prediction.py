"""What the next thresholds will probably be, from those of the steps so far.

A threshold moves little from one micro-step to the next: with training, slowly, and with the data of a micro-step, which
is noise. So the level of each head is followed by an exponential mean.

Predictions change the order in which gradients are summed, hence bits. They are therefore a value, the same on all
ranks because thresholds of shared pools are, kept in the checkpoint as exact numbers.

Shapes: K = H - 1 the heads that select.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FOLLOW = 0.5
"""How much of the way a level goes towards a new threshold: halfway is slow enough for noise and fast enough for the
first steps, in which losses fall quickly."""


@dataclass(frozen=True)
class Prediction:
    """level_K: expected thresholds, None for a head that had none yet; empty until there was a step."""

    level_K: tuple[float | None, ...] = ()

    @property
    def levels(self) -> list[float]:
        """[K], the scores from which pairs are foreseen to be selected; infinite for a head that had no threshold yet."""
        return [math.inf if level is None else level for level in self.level_K]

    def after(self, thresholds: Sequence[Sequence[float]]) -> "Prediction":
        """The prediction when these thresholds [K] have been seen, in turn; NaN is a pool without pairs."""
        now = self
        for threshold_K in thresholds:
            level_K = now.level_K or (None,) * len(threshold_K)
            now = Prediction(tuple(_follow(*values) for values in zip(level_K, threshold_K, strict=True)))
        return now


def _follow(level: float | None, threshold: float) -> float | None:
    if not math.isfinite(threshold):
        return level
    return threshold if level is None else level + FOLLOW * (threshold - level)
