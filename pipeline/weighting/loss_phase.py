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
three to take back, so a row should be foreseen only if it is selected with a probability above 4/5 or so: see `prediction`.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that select, N = B * T * H pairs in a flat list, C of a chunk, D
width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.weighting.cross_entropy import Take, WeightedCrossEntropy, rows_per_chunk, token_losses
from pipeline.weighting.selection import Select, Selection


class HeadLosses(NamedTuple):
    """loss: float32 scalar, this rank's part of the objective. policy_loss_BTH: float32, 0 at invalid pairs, without
    gradient. selection: what was selected for heads 1..., as the selecting function returned it. foreseen_BTK: bool,
    what was expected to be; None where nothing was foreseen."""

    loss: Tensor
    policy_loss_BTH: Tensor
    selection: Selection
    foreseen_BTK: Tensor | None = None


def score_tokens(hidden_BTHD: Tensor, weight_VD: Tensor, targets_BTH: Tensor, valid_BTH: Tensor) -> Tensor:
    """The losses of all valid pairs alone, as `HeadLosses.policy_loss_BTH`."""
    hidden_ND, chunk_rows = hidden_BTHD.flatten(0, 2), _chunk_rows(targets_BTH, weight_VD)
    return token_losses(hidden_ND, weight_VD, targets_BTH.flatten(), _rows(valid_BTH), chunk_rows).view(valid_BTH.shape)


def chunked_losses(
    hidden_BTHD: Tensor, weight_VD: Tensor, targets_BTH: Tensor, valid_BTH: Tensor, select: Select, scale_H: Tensor
) -> HeadLosses:
    """`loss` is the sum of the selected pairs' losses times `scale_H` (float32) of their head. Where autograd records
    nothing no gradient is made either."""
    if not (torch.is_grad_enabled() and (hidden_BTHD.requires_grad or weight_VD.requires_grad)):
        policy_loss_BTH = score_tokens(hidden_BTHD, weight_VD, targets_BTH, valid_BTH)
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
        sums.score(_rows(first_BTH), take=True)
        sums.score(_rows(valid_BTH & ~first_BTH), take=select.foresee is not None and _foreseen(select.foresee, shape[-1]))
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
    losses = []
    for hidden_BTD, targets_BT in zip(hidden_BTHD.unbind(2), targets_BTH.unbind(2), strict=True):
        logits_NV = hidden_BTD.flatten(0, 1) @ weight_VD.T
        losses.append(F.cross_entropy(logits_NV.float(), targets_BT.flatten(), reduction="none").view(targets_BT.shape))
    policy_loss_BTH = torch.stack(losses, dim=-1).where(valid_BTH, 0.0)
    selection = select.choose(policy_loss_BTH.detach()[..., 1:])
    loss = _objective(policy_loss_BTH, _with_first_head(valid_BTH, selection.selected_BTK), scale_H)
    return HeadLosses(loss, policy_loss_BTH.detach(), selection)


def _foreseen(foresee: Callable[[Tensor, Tensor], Tensor], num_heads: int) -> Take:
    """`foresee` for rows of heads 1... among the flat pairs of all heads."""
    return lambda loss_C, rows_C: foresee(loss_C, rows_C // num_heads * (num_heads - 1) + rows_C % num_heads - 1)


def _rows(pairs_BTH: Tensor) -> Tensor:
    """The places of the pairs that are set, in the flat list. Waits for the device."""
    return pairs_BTH.flatten().nonzero()[:, 0]


def _chunk_rows(targets_BTH: Tensor, weight_VD: Tensor) -> int:
    return rows_per_chunk(targets_BTH[..., 0].numel(), len(weight_VD))


def _with_first_head(valid_BTH: Tensor, selected_BTK: Tensor) -> Tensor:
    """Head 0 takes every valid pair."""
    return torch.cat([valid_BTH[..., :1], selected_BTK], dim=-1)


def _objective(policy_loss_BTH: Tensor, selected_BTH: Tensor, scale_H: Tensor) -> Tensor:
    """The sum over the selected losses that are finite; one that is not is seen elsewhere, and discards the step."""
    return (policy_loss_BTH.where(selected_BTH & policy_loss_BTH.isfinite(), 0.0) * scale_H).sum()
