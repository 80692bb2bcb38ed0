"""What the next thresholds will probably be, from those of the steps so far.

A threshold moves little from one micro-step to the next: with training, slowly, and with the data of a micro-step, which
is noise. So the level of each head is followed by an exponential mean.

Predictions change the order in which gradients are summed, hence bits. They are therefore a value, the same on all
ranks because thresholds of shared pools are, kept in the checkpoint as exact numbers. It lives on the device, where thresholds
come into being and levels are used: the host reads it only to save it.

Shapes: K = H - 1 the heads that select.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOLLOW = 0.5
"""How much of the way a level goes towards a new threshold: halfway is slow enough for noise and fast enough for the
first steps, in which losses fall quickly."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """level_K: expected thresholds, float64, NaN for a head that had none yet; None until there was a step."""

    level_K: Tensor | None = None

    @classmethod
    def of(cls, numbers: Sequence[float | None]) -> "Prediction":
        """From what `numbers` gave."""
        levels = [math.nan if number is None else number for number in numbers]
        return cls(torch.tensor(levels, dtype=torch.float64) if levels else None)

    def numbers(self) -> list[float | None]:
        """[K], None for a head that had no threshold yet; empty until there was a step. Waits for the device."""
        levels = [] if self.level_K is None else self.level_K.tolist()
        return [None if math.isnan(level) else level for level in levels]

    def scores(self, device: torch.device) -> Tensor | None:
        """float32 [K], the scores from which pairs are foreseen to be selected; infinite for a head that had no threshold
        yet."""
        level_K = self._on(device)
        return None if level_K is None else torch.where(level_K.isnan(), math.inf, level_K).float()

    def after(self, thresholds: Sequence[Tensor]) -> "Prediction":
        """The prediction when these thresholds (float32 [K]) have been seen, in turn; NaN is a pool without pairs."""
        now = self
        for threshold_K in thresholds:
            threshold_K, level_K = threshold_K.double(), now._on(threshold_K.device)
            followed_K = threshold_K if level_K is None else level_K + FOLLOW * (threshold_K - level_K)
            level_K = torch.full_like(threshold_K, math.nan) if level_K is None else level_K
            followed_K = torch.where(level_K.isnan(), threshold_K, followed_K)
            now = Prediction(torch.where(threshold_K.isfinite(), followed_K, level_K))
        return now

    def _on(self, device: torch.device) -> Tensor | None:
        """From a checkpoint it comes on the host: its first use waits."""
        return None if self.level_K is None else self.level_K.to(device)
