"""The counts that the data of a step determines: pairs, selection sizes and the scale of every loss.

    loss = 1/H * sum over heads h of head_weight_h * (sum of selected policy losses of h) / Z_h

Z_h counts pairs of head h over the whole optimiser step, all ranks and micro-steps: valid ones, or selected ones
(equation 4 of arXiv 2404.07965). Because both are known before any forward, each rank can scale its own sums, and the
sum over ranks and micro-steps is the objective exactly: no mean of means.

Shapes: A micro-steps, B rows, T tokens, H heads, K = H - 1 the heads that select.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.weighting.exchange import Group, HostCopy, all_reduce_sum, on_device
from pipeline.weighting.selection import num_selected, nums_selected


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings of the objective in one step: those that may change from step to step, and what they are counted with.

    k_percent: fraction of a pool's valid pairs that is selected. head_weights: of each head's loss. pool, normalize_by: as in
    `training.selection_pool` and `training.normalize_by`.
    """

    k_percent: float
    head_weights: Sequence[float]
    pool: str
    normalize_by: str


@dataclass(frozen=True)
class StepCounts:
    """Counts over all ranks, all Python integers.

    num_valid_AH: valid pairs of each micro-step and head. num_selected_H: pairs that the step will select.
    pool_selected: m of each head for each shared pool of the step, that is one list for each micro-step (pool
    `global`), a single one (`step`) or none (`rank`, `row`). scale_H: the factor of a selected pair's loss.
    data: sums of the other numbers that were counted along. objective: the settings that it was counted with.
    """

    num_valid_AH: list[list[int]]
    num_selected_H: list[int]
    pool_selected: list[list[int]]
    scale_H: list[float]
    data: list[int]
    objective: ObjectiveSettings

    @property
    def num_valid(self) -> list[int]:
        """Valid pairs of each head in the whole step."""
        return _sum_of_columns(self.num_valid_AH)


def count_pairs(
    valid_ABH: Sequence[Tensor], data: Tensor, objective: ObjectiveSettings, device: torch.device, group: Group
) -> "PendingCounts":
    """Count a step's pairs over all ranks with one all-reduce, whose answer is read later.

    Args:
        valid_ABH: for each micro-step int64 [B, H] on the host, the valid pairs of this rank's rows.
        data: int64 [C] on the host, other numbers of this rank that are summed along over all ranks.
        device: of the all-reduce.
    """
    valid_AH = torch.stack([valid_BH.sum(0) for valid_BH in valid_ABH])
    selected_ABH = [_selected_locally(valid_BH, objective.pool, objective.k_percent) for valid_BH in valid_ABH]
    local_selected_H = torch.stack(selected_ABH).sum(0)
    counted = on_device(torch.cat([valid_AH.flatten(), local_selected_H, data]), torch.int64, device)
    num_micro_steps, num_heads = valid_AH.shape
    return PendingCounts(HostCopy(all_reduce_sum(counted, group)), num_micro_steps, num_heads, objective)


class PendingCounts:
    """A step's counts on their way to the host."""

    def __init__(self, numbers: HostCopy, num_micro_steps: int, num_heads: int, objective: ObjectiveSettings):
        self._numbers, self._num_micro_steps, self._num_heads = numbers, num_micro_steps, num_heads
        self._objective = objective

    def read(self) -> StepCounts:
        """Return the counts. The host waits only where the device has not yet come so far."""
        numbers, num_heads, objective = self._numbers.read(), self._num_heads, self._objective

        # The order in which `count_pairs` joined them.
        num_pairs = self._num_micro_steps * num_heads
        num_valid_AH = [numbers[first : first + num_heads] for first in range(0, num_pairs, num_heads)]
        selected_in_own_pools_H = numbers[num_pairs : num_pairs + num_heads]

        # The sizes of shared pools follow from the counts over all ranks.
        pools = {"global": num_valid_AH, "step": [_sum_of_columns(num_valid_AH)]}.get(objective.pool, [])
        pool_selected = [[num_selected(objective.k_percent, count) for count in valid_H[1:]] for valid_H in pools]

        num_valid_H = _sum_of_columns(num_valid_AH)
        num_selected_H = [num_valid_H[0], *(_sum_of_columns(pool_selected) or selected_in_own_pools_H[1:])]
        return StepCounts(
            num_valid_AH=num_valid_AH,
            num_selected_H=num_selected_H,
            pool_selected=pool_selected,
            scale_H=loss_scale(num_valid_H if objective.normalize_by == "valid" else num_selected_H, objective.head_weights),
            data=numbers[num_pairs + num_heads :],
            objective=objective,
        )


def loss_scale(num_pairs_H: Sequence[int], head_weights: Sequence[float]) -> list[float]:
    """Return head_weight_h / (H * Z_h) for each head; 0 where Z_h is 0."""
    return [
        weight / (len(num_pairs_H) * total) if total else 0.0 for weight, total in zip(head_weights, num_pairs_H, strict=True)
    ]


def _selected_locally(valid_BH: Tensor, pool: str, k_percent: float) -> Tensor:
    """Count the pairs that this rank's own pools select, [H]; zeros for shared pools, whose sizes all ranks know together."""
    if pool == "row":
        return nums_selected(k_percent, valid_BH).sum(0)
    if pool == "rank":
        return nums_selected(k_percent, valid_BH.sum(0))
    return torch.zeros_like(valid_BH[0])


def _sum_of_columns(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
