"""What the next thresholds will probably be, from those of the steps so far.

A threshold moves little from one micro-step to the next: with training, slowly, and with the data of a micro-step, which
is noise. So the level of each head is followed by an exponential mean, and beside it how far a threshold usually lay from
that level, the margin: by its cost (`loss_phase`) a pair is worth foreseeing only where it will be selected with a
probability of about 4/5, which for a normal error is 0.84 standard deviations, or 1.05 mean deviations, above the level.

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
    """level_K: expected thresholds, None for a head that had none yet. margin_K: how far they usually lie from what was
    expected. Both are empty until there was a step."""

    level_K: tuple[float | None, ...] = ()
    margin_K: tuple[float, ...] = ()

    @property
    def limits(self) -> list[float]:
        """[K], the scores from which pairs are foreseen to be selected; infinite for a head that had no threshold yet."""
        return [
            math.inf if level is None else level + margin for level, margin in zip(self.level_K, self.margin_K, strict=True)
        ]

    def after(self, thresholds: Sequence[Sequence[float]]) -> "Prediction":
        """The prediction when these thresholds [K] have been seen, in turn; NaN is a pool without pairs."""
        now = self
        for threshold_K in thresholds:
            now = now._after_one(threshold_K)
        return now

    def _after_one(self, threshold_K: Sequence[float]) -> "Prediction":
        level_K = self.level_K or (None,) * len(threshold_K)
        margin_K = self.margin_K or (0.0,) * len(threshold_K)
        followed = [_follow(*values) for values in zip(level_K, margin_K, threshold_K, strict=True)]
        return Prediction(tuple(level for level, _ in followed), tuple(margin for _, margin in followed))


def _follow(level: float | None, margin: float, threshold: float) -> tuple[float | None, float]:
    if not math.isfinite(threshold):
        return level, margin
    if level is None:
        return threshold, 0.0
    return level + FOLLOW * (threshold - level), margin + FOLLOW * (abs(threshold - level) - margin)
