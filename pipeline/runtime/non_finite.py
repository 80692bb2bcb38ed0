"""The rule for numbers that are not finite, and the parts of it that all ranks run together.

A loss, an excess or a gradient that is NaN or infinite on any rank must not reach a threshold or a weight:

1. A policy or reference loss that is not finite gets the lowest key of the selection, never becomes a threshold
   (`weighting.selection`), and adds 0 to the objective (`weighting.loss_phase`).
2. `SelectionSums.finite` (`runtime.metrics`) notes it on the device. `finite_and_loss` tells all ranks, at the last micro-step,
   by making that micro-step's gradient NaN.
3. DeepSpeed finds a gradient that is not finite on any rank, whatever its cause, and all ranks discard the step
   (`runtime.engine.end_micro_step`). Samples and `step` advance; the learning-rate schedule does not.
4. `describe_bad_numbers` says which rank, model, head and samples it was; `train.advance` counts such steps in a row, and
   stops the job after `training.max_skipped_steps`.

So bad losses and bad gradients take one way, with one collective a step and no wait for the device.

Shapes: B rows, H heads, R ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def finite_and_loss(finite: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Agree on a step over ranks, with one all-reduce.

    Args:
        finite: bool scalar, false where this rank met a number that is not finite.
        loss: scalar, this rank's part of the step's objective.

    Returns:
        1, or NaN where `finite` is false on any rank: a factor for the step's last loss.
        The sum of `loss` over ranks, float64. Each rank adds its number to zeros of the others, and all sum up the same row, so
        that every rank has the same bits.
    """
    numbers_R2 = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64, device=loss.device)
    numbers_R2[dist.get_rank()] = torch.stack([(~finite).double(), loss.double()])
    dist.all_reduce(numbers_R2)
    return torch.where(numbers_R2[:, 0].sum() > 0, math.nan, 1.0), numbers_R2[:, 1].sum()


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
