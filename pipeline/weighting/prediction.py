"""Prediction of the next thresholds, from those of the steps so far.

A threshold moves little from one micro-step to the next: slowly with training, and with the data of a micro-step, which is
noise. So each head's threshold is followed by an exponential moving average.

Predictions change the order in which gradients are summed, hence bits. They are therefore a value, the same on all ranks
because thresholds of shared pools are, and kept in the checkpoint as exact numbers. The value lives on the device, where
thresholds are computed and used: the host reads it only to save it.

Shapes: K = H - 1 the heads that select.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOLLOW = 0.5
"""Weight of a new threshold in the moving average: halfway is slow enough for noise and fast enough for the first steps, in
which losses fall quickly."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The expected thresholds. average_K: float64, NaN for a head that had no threshold yet; None before the first step."""

    average_K: Tensor | None = None

    @classmethod
    def of(cls, numbers: Sequence[float | None]) -> "Prediction":
        """Restore what `numbers` gave."""
        values = [math.nan if number is None else number for number in numbers]
        return cls(torch.tensor(values, dtype=torch.float64) if values else None)

    def numbers(self) -> list[float | None]:
        """Return [K] as plain numbers, None for a head without a threshold yet; empty before the first step. Waits for the
        device."""
        values = [] if self.average_K is None else self.average_K.tolist()
        return [None if math.isnan(value) else value for value in values]

    def thresholds(self, device: torch.device) -> Tensor | None:
        """Return the predicted thresholds, float32 [K]; infinite for a head that had none yet."""
        average_K = self._on(device)
        return None if average_K is None else torch.where(average_K.isnan(), math.inf, average_K).float()

    def after(self, thresholds: Sequence[Tensor]) -> "Prediction":
        """Follow thresholds (float32 [K]) that were seen, one after the other; NaN stands for a pool without pairs."""
        now = self
        for threshold_K in thresholds:
            threshold_K, average_K = threshold_K.double(), now._on(threshold_K.device)
            if average_K is None:
                average_K = torch.full_like(threshold_K, math.nan)

            # A head's first threshold is taken as it is; an empty pool changes nothing.
            followed_K = average_K + FOLLOW * (threshold_K - average_K)
            followed_K = torch.where(average_K.isnan(), threshold_K, followed_K)
            now = Prediction(torch.where(threshold_K.isfinite(), followed_K, average_K))
        return now

    def _on(self, device: torch.device) -> Tensor | None:
        # From a checkpoint it comes on the host: its first use waits for the copy.
        return None if self.average_K is None else self.average_K.to(device)
