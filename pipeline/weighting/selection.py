"""The pairs that are trained on: the exact top k_percent of a pool by signed excess loss (arXiv 2404.07965, applied to
each head of arXiv 2404.19737 by itself).

Exactly m = floor(k_percent * n + 0.5) of a pool's n valid pairs are selected, at least one if there is any; equal
excesses are taken in the order (micro-step, rank, row, position), which is the order of the global batch's rows. The
comparison is made on int32 keys that order like the floats, so the answer is a function of the pool's bits alone: it
depends neither on how the pool lies on ranks nor on how the ranks see one another's keys (`exchange`).

Everything here is a pure function of tensors on one process.

Shapes: M micro-steps of a pool, B rows, T tokens, K the heads that select (1...H-1), P the pairs of a pool.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.weighting.cross_entropy import MarginPredictor

INVALID_KEY = -(2**31)
"""Key of a pair outside the pool; below the key of every float."""
NON_FINITE_KEY = INVALID_KEY + 1
"""Key of a valid pair whose excess is NaN or infinite; likewise below every finite float's."""


class Selection(NamedTuple):
    """The pairs selected for heads 1...H-1 of a rank's micro-batch.

    selected_BTK: bool.
    threshold_K: float32, the smallest selected excess of the pool, NaN where it is empty; where this rank has several
        pools in the micro-batch, their mean weighted by valid pairs.
    threshold_weight_K: float64, the valid pairs for which this rank's threshold stands in a mean over ranks: a pool
        that ranks share counts once, on the first.
    excess_BTK: float32, policy minus reference loss, 0 where a pair is invalid (`score.Comparison.excess`, where one is not
        finite too); None without a reference.
    finite: bool scalar, true if every valid score that this rank has seen was finite.
    """

    selected_BTK: Tensor
    threshold_K: Tensor
    threshold_weight_K: Tensor
    excess_BTK: Tensor | None
    finite: Tensor


class Selector(MarginPredictor, Protocol):
    """The object that the model calls at its fixed point, when the policy's losses are known (`selectors`)."""

    @property
    def share(self) -> float:
        """The part of the valid pairs that will be selected, about."""
        ...

    @property
    def predicts(self) -> bool:
        """True if `predicted_margin` may be called."""
        ...

    def after_first_head(self, first_loss_BT: Tensor) -> "Selector":
        """Return the selector that knows the policy's losses of head 0 (float32), which come first and may be what the others
        are compared with."""
        ...

    def select(self, policy_loss_BTK: Tensor) -> Selection:
        """Select exactly, from float32 losses of heads 1…."""
        ...


def among_selecting_heads(indices_P: Tensor, num_selecting: int) -> Tensor:
    """Turn indices into the flattened [B, T, H], of pairs of heads 1..., into indices into the flattened [B, T, K]."""
    num_heads = num_selecting + 1
    return indices_P // num_heads * num_selecting + indices_P % num_heads - 1


def num_selected(k_percent: float, num_valid: int) -> int:
    """m for a pool of `num_valid` pairs, in float64."""
    return max(1, math.floor(k_percent * num_valid + 0.5)) if num_valid else 0


def nums_selected(k_percent: float, num_valid: Tensor) -> Tensor:
    """`num_selected` of each entry of an integer tensor, as int64: torch's float64 arithmetic is Python's."""
    rounded = torch.floor(k_percent * num_valid.double() + 0.5).long()
    return torch.where(num_valid > 0, rounded.clamp(min=1), 0)


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


def select_all(policy_loss_BTK: Tensor, valid_BTK: Tensor) -> Selection:
    """Select every valid pair, as training without a reference does."""
    none_K = policy_loss_BTK.new_zeros(policy_loss_BTK.shape[-1:])
    return Selection(
        selected_BTK=valid_BTK,
        threshold_K=none_K + math.nan,
        threshold_weight_K=none_K.double(),
        excess_BTK=None,
        finite=torch.isfinite(torch.where(valid_BTK, policy_loss_BTK, 0.0)).all(),
    )
