"""What the data of a step alone determines of its loss: counts, selection sizes and the scale of every row.

    loss = 1/H * sum over heads h of head_weight_h * (sum of selected policy losses of h) / Z_h

Z_h counts pairs of head h over the whole optimiser step, all ranks and micro-steps: valid ones, or selected ones
(equation 4 of arXiv 2404.07965). Because both are known before any forward, each rank can scale its own sums, and the
sum over ranks and micro-steps is the objective exactly: no mean of means.

Shapes: A micro-steps, B rows, T tokens, H heads, K = H - 1 the heads that select.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.weighting.exchange import Group, OnTheWay, all_reduce_sum, on_device
from pipeline.weighting.selection import num_selected, nums_selected


@dataclass(frozen=True)
class StepPlan:
    """Counts over all ranks, all Python integers.

    num_valid_AH: valid pairs of each micro-step and head. num_selected_H: pairs that the step will select.
    pool_selected: m of each head for each shared pool of the step, that is one list for each micro-step (pool
    `global`), a single one (`step`) or none (`rank`, `row`). scale_H: what a selected pair's loss is multiplied by.
    data: sums of whatever else was to be counted.
    """

    num_valid_AH: list[list[int]]
    num_selected_H: list[int]
    pool_selected: list[list[int]]
    scale_H: list[float]
    data: list[int]

    @property
    def num_valid(self) -> list[int]:
        """Valid pairs of each head in the whole step."""
        return _sum_of_columns(self.num_valid_AH)


def plan_step(
    valid_ABH: Sequence[Tensor],
    data: Tensor,
    *,
    pool: str,
    k_percent: float,
    normalize_by: str,
    head_weights: Sequence[float],
    device: torch.device,
    group: Group,
) -> Callable[[], StepPlan]:
    """Count a step's pairs over all ranks with one all-reduce; what is returned reads it, and waits for the device only if it
    is called before the device has come so far.

    Args:
        valid_ABH: for each micro-step int64 [B, H] on the host, the valid pairs of this rank's rows.
        data: int64 [C] on the host, anything else of this rank to be added up over all.
        device: where the ranks meet.
    """
    valid_AH = torch.stack([valid_BH.sum(0) for valid_BH in valid_ABH])
    local_selected_H = torch.stack([_selected_locally(valid_BH, pool, k_percent) for valid_BH in valid_ABH]).sum(0)
    counted = on_device(torch.cat([valid_AH.flatten(), local_selected_H, data]), torch.int64, device)
    coming = OnTheWay(all_reduce_sum(counted, group))
    num_micro_steps, num_heads = valid_AH.shape
    return lambda: _plan(coming.read(), num_micro_steps, num_heads, pool, k_percent, normalize_by, head_weights)


def _plan(
    numbers: list[int],
    num_micro_steps: int,
    num_heads: int,
    pool: str,
    k_percent: float,
    normalize_by: str,
    head_weights: Sequence[float],
) -> StepPlan:
    num_pairs = num_micro_steps * num_heads
    num_valid_AH = [numbers[first : first + num_heads] for first in range(0, num_pairs, num_heads)]
    selected_in_own_pools_H = numbers[num_pairs : num_pairs + num_heads]
    pools = {"global": num_valid_AH, "step": [_sum_of_columns(num_valid_AH)]}.get(pool, [])
    pool_selected = [[num_selected(k_percent, count) for count in valid_H[1:]] for valid_H in pools]
    num_valid_H = _sum_of_columns(num_valid_AH)
    num_selected_H = [num_valid_H[0], *(_sum_of_columns(pool_selected) or selected_in_own_pools_H[1:])]
    return StepPlan(
        num_valid_AH=num_valid_AH,
        num_selected_H=num_selected_H,
        pool_selected=pool_selected,
        scale_H=loss_scale(num_valid_H if normalize_by == "valid" else num_selected_H, head_weights),
        data=numbers[num_pairs + num_heads :],
    )


def loss_scale(num_pairs_H: Sequence[int], head_weights: Sequence[float]) -> list[float]:
    """head_weight_h / (H * Z_h) for each head; 0 where Z_h is 0."""
    return [
        weight / (len(num_pairs_H) * total) if total else 0.0 for weight, total in zip(head_weights, num_pairs_H, strict=True)
    ]


def _selected_locally(valid_BH: Tensor, pool: str, k_percent: float) -> Tensor:
    """[H]: how many pairs this rank's own pools select; zeros for shared pools, whose sizes all ranks know together."""
    if pool == "row":
        return nums_selected(k_percent, valid_BH).sum(0)
    if pool == "rank":
        return nums_selected(k_percent, valid_BH.sum(0))
    return torch.zeros_like(valid_BH[0])


def _sum_of_columns(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
