"""The four pools over which the top k_percent is taken.

    global  the micro-step, over all ranks
    step    all micro-steps of the optimiser step, over all ranks
    rank    this rank's micro-batch
    row     each row by itself

`global` and `step` are shared by the ranks and go through an exchange; the others are this rank's own, without a
collective. `score` says by what pairs compete.

Shapes: M micro-steps of a pool, B rows, T tokens, K the heads that select (1...H-1), P pools of a rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from pipeline.weighting.exchange import Group, exchange_named, on_device, rank_in, select_by_radix
from pipeline.weighting.selection import INVALID_KEY, NON_FINITE_KEY, Selection, excess_keys, excess_of_key, nums_selected

SHARED_POOLS = ("global", "step")


def select_shared(
    score_MBTK: Tensor,
    valid_MBTK: Tensor,
    num_valid_MK: Sequence[Sequence[int]],
    num_selected_K: Sequence[int],
    exchange: str,
    group: Group,
) -> list[Selection]:
    """Select from one pool of M micro-steps over all ranks of `group` (None: this process alone).

    Returns a selection for each micro-step.

    `num_valid_MK` and `num_selected_K` count over all ranks; they are known beforehand from the data.
    """
    num_keys = score_MBTK[..., 0].numel() * score_MBTK.shape[-1]
    keys_MBTK = excess_keys(score_MBTK, valid_MBTK)
    with record_function("exchange"):
        selected_MBTK, threshold_K, finite = exchange_named(exchange, num_keys, group)(keys_MBTK, num_selected_K, group)
    # Every rank knows the pool's threshold; in a mean over ranks it counts once, on the first.
    weight_MK = on_device(num_valid_MK, torch.float64, keys_MBTK.device) * (rank_in(group) == 0)
    return [
        Selection(selected_BTK, threshold_K, weight_K, None, finite)
        for selected_BTK, weight_K in zip(selected_MBTK, weight_MK, strict=True)
    ]


def select_local(score_BTK: Tensor, valid_BTK: Tensor, k_percent: float, pool: str) -> Selection:
    """Select from the pool `rank` or the pools `row` of one micro-batch; no collective, no wait for the device."""
    keys_BTK = excess_keys(score_BTK, valid_BTK)
    num_rows, _, num_heads = keys_BTK.shape
    keys_PTK = keys_BTK.view(num_rows if pool == "row" else 1, -1, num_heads)
    valid_PK = valid_BTK.view(keys_PTK.shape).sum(1)
    selected_PTK, threshold_PK, finite = select_top_of_each(keys_PTK, nums_selected(k_percent, valid_PK))
    weight_K = valid_PK.sum(0).double()
    weighted_PK = torch.where(valid_PK > 0, threshold_PK.double() * valid_PK, 0.0)
    return Selection(
        selected_BTK=selected_PTK.reshape(keys_BTK.shape),
        threshold_K=(weighted_PK.sum(0) / weight_K).float(),
        threshold_weight_K=weight_K,
        excess_BTK=None,
        finite=finite,
    )


def select_top_of_each(keys_PTK: Tensor, count_PK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`selection.select_top` with every entry of P and K a pool of its own.

    Returns (selected_PTK, threshold_PK, NaN where the count is 0, and whether every valid key is that of a finite number). On a
    device the counts are not waited for, which leaves `radix` without a group.
    """
    num_pools, num_tokens, num_heads = keys_PTK.shape
    # Each pool in one piece of memory.
    keys_QT, count_Q = keys_PTK.transpose(1, 2).reshape(-1, num_tokens), count_PK.flatten()
    if keys_PTK.device.type == "cpu":
        selected_QT, threshold_Q, finite = _select_on_host(keys_QT, count_Q)
    else:
        selected_11TQ, threshold_Q, finite = select_by_radix(keys_QT.T[None, None], count_Q, None)
        selected_QT = selected_11TQ[0, 0].T
    selected_PTK = selected_QT.view(num_pools, num_heads, num_tokens).transpose(1, 2)
    return selected_PTK, threshold_Q.view(num_pools, num_heads), finite


def _select_on_host(keys_QT: Tensor, count_Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find all pools' thresholds in one call: of many short pools a call for each takes several times as long.

    The call takes one rank for all. So a pool that selects fewer pairs than another gets as many keys above all others: its
    threshold then comes as late as the other's.
    """
    # By way of numpy, because reading a tensor is a wait for its device, which is counted.
    most, least = max(1, int(count_Q.numpy().max())), int(count_Q.numpy().min())
    is_above = torch.arange(most - least) < (most - count_Q)[:, None]
    added = torch.where(is_above, 2**31 - 1, INVALID_KEY).int()
    padded = torch.cat([keys_QT, added], dim=1)
    threshold_key_Q1 = padded.kthvalue(padded.shape[1] - most + 1, dim=1, keepdim=True).values

    # All above the threshold, and of those that equal it the first.
    above_QT, tied_QT = keys_QT > threshold_key_Q1, keys_QT == threshold_key_Q1
    needed_Q1 = count_Q[:, None] - above_QT.sum(1, keepdim=True)
    selected_QT = above_QT | (tied_QT & (tied_QT.cumsum(1) <= needed_Q1))
    threshold_Q = torch.where(count_Q > 0, excess_of_key(threshold_key_Q1[:, 0]), math.nan)
    return selected_QT, threshold_Q, (keys_QT != NON_FINITE_KEY).all()
