"""Which pairs are trained on: the exact top k_percent of a pool by signed excess loss (arXiv 2404.07965, applied to
each head of arXiv 2404.19737 by itself).

Exactly m = floor(k_percent * n + 0.5) of a pool's n valid pairs are selected, at least one if there is any; equal
excesses are taken in the order (rank, row, position). The comparison is made on int32 keys that order like the floats,
so the answer is a function of the pool's bits alone: it does not depend on how the pool lies on ranks.

Everything here but `select_pairs` is a pure function of tensors; `select_pairs` adds one all-gather.

Shapes: R ranks, B rows, T tokens, K the heads that select (1...H-1), P the pairs of a pool.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.weighting.exchange import Group, all_gather

INVALID_KEY = -(2**31)
"""Key of a pair outside the pool; below the key of every float."""
NON_FINITE_KEY = INVALID_KEY + 1
"""Key of a valid pair whose excess is NaN or infinite; likewise below every finite float's."""


class Selection(NamedTuple):
    """What was chosen for heads 1...H-1 of a rank's micro-batch.

    selected_BTK: bool. threshold_K: float32, the smallest selected excess of the whole pool, NaN where it is empty.
    excess_BTK: float32, 0 where a pair is invalid or its excess not finite; None where nothing was compared.
    finite: bool scalar, whether every valid excess of the pool, on all ranks, was finite.
    """

    selected_BTK: Tensor
    threshold_K: Tensor
    excess_BTK: Tensor | None
    finite: Tensor


Select = Callable[[Tensor], Selection]
"""From policy_loss_BTK (float32) to the selection; what the model calls at its fixed point."""


def num_selected(k_percent: float, num_valid: int) -> int:
    """m for a pool of `num_valid` pairs, in float64."""
    return max(1, math.floor(k_percent * num_valid + 0.5)) if num_valid else 0


def shifted_reference_loss(reference_token_loss_BT: Tensor, num_heads: int) -> Tensor:
    """reference_loss_BTH[b, t, h] = loss of token t+1+h given all before it; 0 where that lies beyond the row."""
    padded = torch.nn.functional.pad(reference_token_loss_BT, (0, num_heads))
    return padded.unfold(1, num_heads, 1)[:, 1:]


def excess_keys(excess: Tensor, valid: Tensor) -> Tensor:
    """int32 keys that order as the float32 excesses do (-0.0 equals 0.0), with the two marks above."""
    bits = (excess + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = torch.where(torch.isfinite(excess), keys, NON_FINITE_KEY)
    return torch.where(valid, keys, INVALID_KEY)


def excess_of_key(keys: Tensor) -> Tensor:
    """The float32 excess that a finite key stands for."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def select_top(keys_P: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(selected_P bool with exactly `count` set, the smallest selected excess as a float32 scalar).

    `keys_P` lies in tie order and holds at least `count` keys of valid pairs.
    """
    if count == 0:
        return torch.zeros_like(keys_P, dtype=torch.bool), torch.full((), math.nan, device=keys_P.device)
    threshold_key = torch.kthvalue(keys_P, keys_P.numel() - count + 1).values
    above_P = keys_P > threshold_key
    tied_P = keys_P == threshold_key
    taken_P = above_P | (tied_P & (tied_P.cumsum(0) <= count - above_P.sum()))
    return taken_P, excess_of_key(threshold_key)


def select_pairs(
    policy_loss_BTK: Tensor,
    reference_loss_BTK: Tensor,
    valid_BTK: Tensor,
    num_selected_K: Sequence[int],
    group: Group,
    rank: int,
) -> Selection:
    """Select over the pool of all ranks of `group` (None: this process alone); one all-gather, the same on all ranks.

    Losses are float32 [B, T, K]; `num_selected_K` is m for each head over the whole pool, known beforehand from the
    data; `rank` is this process's place in the group.
    """
    excess_BTK = policy_loss_BTK - reference_loss_BTK
    keys_RBTK = all_gather(excess_keys(excess_BTK, valid_BTK), group)
    selected, thresholds = [], []
    for head, count in enumerate(num_selected_K):
        keys_RBT = keys_RBTK[..., head]
        selected_P, threshold = select_top(keys_RBT.reshape(-1), count)
        selected.append(selected_P.view(keys_RBT.shape)[rank])
        thresholds.append(threshold)
    return Selection(
        selected_BTK=torch.stack(selected, dim=-1),
        threshold_K=torch.stack(thresholds),
        excess_BTK=torch.where(valid_BTK & torch.isfinite(excess_BTK), excess_BTK, 0.0),
        finite=(keys_RBTK != NON_FINITE_KEY).all(),
    )


def select_all(policy_loss_BTK: Tensor, valid_BTK: Tensor) -> Selection:
    """Every valid pair: training without a reference."""
    return Selection(
        selected_BTK=valid_BTK,
        threshold_K=policy_loss_BTK.new_full(policy_loss_BTK.shape[-1:], math.nan),
        excess_BTK=None,
        finite=torch.isfinite(torch.where(valid_BTK, policy_loss_BTK, 0.0)).all(),
    )
