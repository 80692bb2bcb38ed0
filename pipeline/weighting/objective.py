"""What the data of a step alone determines of its loss: counts, selection sizes and the scale of every row.

    loss = 1/H * sum over heads h of head_weight_h * (sum of selected policy losses of h) / Z_h

Z_h counts pairs of head h over the whole optimiser step, all ranks and micro-steps: valid ones, or selected ones
(equation 4 of arXiv 2404.07965). Because both are known before any forward, each rank can scale its own sums, and the
sum over ranks and micro-steps is the objective exactly: no mean of means.

Shapes: A micro-steps, B rows, T tokens, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.weighting.exchange import Group, all_reduce_sum
from pipeline.weighting.selection import num_selected


@dataclass(frozen=True)
class StepPlan:
    """num_valid_AH and num_selected_AH: pairs over all ranks. scale_H: what a selected pair's loss is multiplied by.
    num_tokens: tokens of the step without padding, over all ranks."""

    num_valid_AH: list[list[int]]
    num_selected_AH: list[list[int]]
    scale_H: list[float]
    num_tokens: int


def plan_step(
    valid_ABTH: Sequence[Tensor],
    num_tokens: Tensor,
    *,
    k_percent: float,
    normalize_by: str,
    head_weights: Sequence[float],
    group: Group,
) -> StepPlan:
    """Count a step's pairs over all ranks with one all-reduce.

    Args:
        valid_ABTH: for each micro-step bool [B, T, H], this rank's valid pairs.
        num_tokens: int64 scalar, this rank's tokens in the step.
    """
    local = torch.stack([valid_BTH.sum((0, 1)) for valid_BTH in valid_ABTH])
    counts = all_reduce_sum(torch.cat([local.reshape(-1), num_tokens.reshape(1)]), group).tolist()
    num_heads = local.shape[1]
    num_valid_AH = [counts[start : start + num_heads] for start in range(0, local.numel(), num_heads)]
    num_selected_AH = [
        [count if head == 0 else num_selected(k_percent, count) for head, count in enumerate(valid_H)]
        for valid_H in num_valid_AH
    ]
    return StepPlan(
        num_valid_AH=num_valid_AH,
        num_selected_AH=num_selected_AH,
        scale_H=loss_scale(num_valid_AH if normalize_by == "valid" else num_selected_AH, head_weights),
        num_tokens=counts[-1],
    )


def loss_scale(num_pairs_AH: Sequence[Sequence[int]], head_weights: Sequence[float]) -> list[float]:
    """head_weight_h / (H * Z_h) for each head; 0 where Z_h is 0."""
    totals = [sum(column) for column in zip(*num_pairs_AH, strict=True)]
    return [weight / (len(totals) * total) if total else 0.0 for weight, total in zip(head_weights, totals, strict=True)]
