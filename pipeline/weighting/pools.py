"""The four pools over which the top k_percent is taken.

    global  the micro-step, over all ranks
    step    all micro-steps of the optimiser step, over all ranks
    rank    this rank's micro-batch
    row     each row by itself

`global` and `step` are shared by the ranks and go through an exchange; the others are this rank's own, without a
collective. `score` says by what pairs compete.

Shapes: M micro-steps of a pool, B rows, T tokens, K the heads that select (1...H-1), P pools of a rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from pipeline.weighting.exchange import Group, exchange_named, on_device, rank_in, select_by_radix
from pipeline.weighting.selection import Selection, excess_keys, nums_selected

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

    Returns (selected_PTK, threshold_PK, NaN where the count is 0, and whether every valid key is that of a finite number). The
    shared pools' algorithms do it, without a group, so that these pools cost what those cost on one rank. On a device the
    counts are not waited for, which leaves `radix`.
    """
    num_pools, num_tokens, num_heads = keys_PTK.shape
    # Each pool in one piece of memory, as a head of one long row.
    keys_11TQ = keys_PTK.transpose(1, 2).reshape(-1, num_tokens).T[None, None]
    if keys_PTK.device.type == "cpu":
        select = exchange_named("auto", num_tokens * num_heads, None)
        # By way of numpy, because `tolist` of a tensor is a wait for its device, which is counted.
        selected_11TQ, threshold_Q, finite = select(keys_11TQ, count_PK.flatten().numpy().tolist(), None)
    else:
        selected_11TQ, threshold_Q, finite = select_by_radix(keys_11TQ, count_PK.flatten(), None)
    selected_PTK = selected_11TQ.view(num_tokens, num_pools, num_heads).transpose(0, 1)
    return selected_PTK, threshold_Q.view(num_pools, num_heads), finite
