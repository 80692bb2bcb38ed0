"""The rule for numbers that are not finite, and the parts of it that all ranks run together.

A loss, an excess or a gradient that is NaN or infinite on any rank must not reach a threshold or a weight:

1. A policy or reference loss that is not finite gets the lowest key of the selection, never becomes a threshold
   (`weighting.selection`), and adds 0 to the objective (`weighting.loss_phase`).
2. `SelectionSums.finite` (`runtime.metrics`) notes it on the device. `all_finite_or_nan` tells all ranks, at the last
   micro-step, by making that micro-step's gradient NaN.
3. DeepSpeed finds a gradient that is not finite on any rank, whatever its cause, and all ranks discard the step
   (`runtime.engine.end_micro_step`). Samples and `step` advance; the learning-rate schedule does not.
4. `describe_bad_numbers` says which rank, model, head and samples it was; `train.advance` counts such steps in a row, and
   stops the job after `training.max_skipped_steps`.

So bad losses and bad gradients take one way, with one collective a step and no wait for the device.

Shapes: B rows, H heads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def all_finite_or_nan(finite: Tensor) -> Tensor:
    """Return 1, or NaN where `finite` (bool scalar) is false on any rank; a factor for the step's last loss."""
    all_finite = finite.float()
    dist.all_reduce(all_finite, op=dist.ReduceOp.MIN)
    return torch.where(all_finite > 0, 1.0, math.nan)


def describe_bad_numbers(
    bad_rows: Sequence[tuple[Tensor, Tensor]], bad_gradient_rows: Sequence[Tensor], keys: Sequence[Sequence[str]]
) -> str:
    """Name the ranks, models, heads and samples of bad losses; where every loss was finite, those of bad gradients.

    Every rank must call, after a step that all discarded.

    Args:
        bad_rows: for each micro-batch of this rank bool [B, H] of the policy and of the reference, true where its loss was not
            finite.
        bad_gradient_rows: for each micro-batch bool [B], true where the gradient was not.
        keys: for each micro-batch the samples of its rows.
    """
    # This rank's samples, by where their number was bad.
    losses: dict[str, list[str]] = {}
    gradients: dict[str, list[str]] = {}
    for of_models, bad_B, samples in zip(bad_rows, bad_gradient_rows, keys, strict=True):
        for model, bad_BH in zip(("policy", "reference"), of_models, strict=True):
            for row, head in bad_BH.nonzero().tolist():
                losses.setdefault(f"{model} loss of head {head}", []).append(samples[row])
        for (row,) in bad_B.nonzero().tolist():
            gradients.setdefault("policy gradient", []).append(samples[row])

    # After a bad loss every rank's gradient is made NaN on purpose, so losses come first.
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (losses, gradients))
    for found in zip(*by_rank, strict=True):
        sentences = [
            f"rank {rank}, {where}: {', '.join(samples[:4])}{' …' if len(samples) > 4 else ''}"
            for rank, of_rank in enumerate(found)
            for where, samples in sorted(of_rank.items())
        ]
        if sentences:
            return "; ".join(sentences)
    return "the gradient of all ranks together (each rank's own was finite)"
