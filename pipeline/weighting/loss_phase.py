"""From hidden states to losses, the selection among them, and the objective over what was selected.

Two ways to the same gradient. `dense_losses` is the oracle: full logits a head, `F.cross_entropy`, autograd. `chunked_losses`
never holds more than one chunk of logits, and the backward of the unembedding touches the rows of heads 1... only
where they were selected:

    one pass over all valid rows gives their losses, and at once the gradients of head 0 and, where the selection can be
    foreseen, of the rows that it is expected to take;
    the exact selection runs on the losses (a collective, for pools that ranks share);
    rows missed are added, their logits computed again, and rows taken wrongly are taken back.

Without a prediction everything selected is missed and added: the two-pass form. With a good one a row's logits are
computed once. A row costs one product with the unembedding to score, two for its gradient, three to add later and
three to take back. So that the device never waits for the host to count, room is made beforehand for the gradients of as
many rows as will be selected; having been paid for, it is used by every row more probably selected than not.

The host waits for the device once, to know how many rows to repair. `num_valid_H` are the valid pairs of each head, where the
host knows them; None counts them on the device, and waits.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that select, N = B * T * H pairs in a flat list, C of a chunk, D
width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.weighting.cross_entropy import Foresee, WeightedCrossEntropy, places_of, rows_per_chunk, token_losses
from pipeline.weighting.selection import Select, Selection


class HeadLosses(NamedTuple):
    """loss: float32 scalar, this rank's part of the objective. policy_loss_BTH: float32, 0 at invalid pairs, without
    gradient. selection: what was selected for heads 1..., as the selecting function returned it. foreseen_BTK: bool,
    what was expected to be; None where nothing was foreseen."""

    loss: Tensor
    policy_loss_BTH: Tensor
    selection: Selection
    foreseen_BTK: Tensor | None = None


def score_tokens(
    hidden_BTHD: Tensor,
    weight_VD: Tensor,
    targets_BTH: Tensor,
    valid_BTH: Tensor,
    num_valid_H: Sequence[int] | None = None,
) -> Tensor:
    """The losses of all valid pairs alone, as `HeadLosses.policy_loss_BTH`."""
    rows = places_of(valid_BTH, None if num_valid_H is None else sum(num_valid_H))
    chunk_rows = _chunk_rows(targets_BTH, weight_VD)
    return token_losses(hidden_BTHD.flatten(0, 2), weight_VD, targets_BTH.flatten(), rows, chunk_rows).view(valid_BTH.shape)


def chunked_losses(
    hidden_BTHD: Tensor,
    weight_VD: Tensor,
    targets_BTH: Tensor,
    valid_BTH: Tensor,
    select: Select,
    scale_H: Tensor,
    num_valid_H: Sequence[int] | None = None,
) -> HeadLosses:
    """`loss` is the sum of the selected pairs' losses times `scale_H` (float32) of their head. Where autograd records
    nothing no gradient is made either."""
    if not (torch.is_grad_enabled() and (hidden_BTHD.requires_grad or weight_VD.requires_grad)):
        policy_loss_BTH = score_tokens(hidden_BTHD, weight_VD, targets_BTH, valid_BTH, num_valid_H)
        selection = select.choose(policy_loss_BTH[..., 1:])
        loss = _objective(policy_loss_BTH, _with_first_head(valid_BTH, selection.selected_BTK), scale_H)
        return HeadLosses(loss, policy_loss_BTH, selection)
    hidden_ND, shape = hidden_BTHD.flatten(0, 2), valid_BTH.shape
    with torch.no_grad():
        sums = WeightedCrossEntropy(
            hidden_ND,
            weight_VD,
            targets_BTH.flatten(),
            scale_H.expand(shape).flatten(),
            _chunk_rows(targets_BTH, weight_VD),
        )
        first_BTH = _with_first_head(valid_BTH, torch.zeros_like(valid_BTH[..., 1:]))
        num_first, num_others = (None, None) if num_valid_H is None else (num_valid_H[0], sum(num_valid_H[1:]))
        sums.score(places_of(first_BTH, num_first), take=1)
        others = places_of(valid_BTH & ~first_BTH, num_others)
        if select.foresee is None:
            sums.score(others, take=0)
        else:
            sums.score(others, select.share, _foreseen(select.foresee, shape[-1]))
        policy_loss_BTH = sums.loss_N.view(shape)
        selection = select.choose(policy_loss_BTH[..., 1:])
        selected_BTH = _with_first_head(valid_BTH, selection.selected_BTK)
        sums.repair(selected_BTH.flatten())
        loss = _objective(policy_loss_BTH, selected_BTH, scale_H)
    foreseen_BTK = None if select.foresee is None else sums.taken_N.view(shape)[..., 1:]
    return HeadLosses(sums.with_gradients(loss, hidden_ND, weight_VD), policy_loss_BTH, selection, foreseen_BTK)


def dense_losses(
    hidden_BTHD: Tensor, weight_VD: Tensor, targets_BTH: Tensor, valid_BTH: Tensor, select: Select, scale_H: Tensor
) -> HeadLosses:
    """The same by the formula, slowly: all logits of a head at once, and autograd."""
    losses, weight_DV = [], weight_VD.float().T
    for hidden_BTD, targets_BT in zip(hidden_BTHD.unbind(2), targets_BTH.unbind(2), strict=True):
        logits_NV = hidden_BTD.flatten(0, 1).float() @ weight_DV
        losses.append(F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none").view(targets_BT.shape))
    policy_loss_BTH = torch.stack(losses, dim=-1).where(valid_BTH, 0.0)
    selection = select.choose(policy_loss_BTH.detach()[..., 1:])
    loss = _objective(policy_loss_BTH, _with_first_head(valid_BTH, selection.selected_BTK), scale_H)
    return HeadLosses(loss, policy_loss_BTH.detach(), selection)


def _foreseen(foresee: Foresee, num_heads: int) -> Foresee:
    """`foresee` for rows of heads 1... among the flat pairs of all heads."""
    return lambda loss_C, rows_C: foresee(loss_C, rows_C // num_heads * (num_heads - 1) + rows_C % num_heads - 1)


def _chunk_rows(targets_BTH: Tensor, weight_VD: Tensor) -> int:
    return rows_per_chunk(targets_BTH[..., 0].numel(), len(weight_VD), weight_VD.device.type)


def _with_first_head(valid_BTH: Tensor, selected_BTK: Tensor) -> Tensor:
    """Head 0 takes every valid pair."""
    return torch.cat([valid_BTH[..., :1], selected_BTK], dim=-1)


def _objective(policy_loss_BTH: Tensor, selected_BTH: Tensor, scale_H: Tensor) -> Tensor:
    """The sum over the selected losses that are finite; one that is not is seen elsewhere, and discards the step."""
    return (policy_loss_BTH.where(selected_BTH & policy_loss_BTH.isfinite(), 0.0) * scale_H).sum()
