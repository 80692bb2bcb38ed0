"""The loss phase: from hidden states to losses, the selection among them, and the objective over the selected pairs.

Two ways to the same gradient. `dense_losses` is the oracle: full logits a head, `F.cross_entropy`, autograd. `chunked_losses`
never holds more than one chunk of logits, and the backward of heads 1... touches the unembedding only for selected rows:

    1. one pass over all valid rows computes their losses, and at once the gradients of head 0 and of the rows that a
       predicted threshold says will be selected;
    2. the exact selection runs on the losses (a collective, for pools that ranks share);
    3. rows missed are added, their logits computed again, and rows taken wrongly are subtracted.

Without a prediction all selected rows are missed and added: the two-pass form. With a good one each row's logits are computed
once. A row costs one product with the unembedding to score, two for its gradient, three to add later and three to subtract.
The gradients of as many rows are computed as will be selected, a number known beforehand.

The host waits for the device once a micro-batch, to size step 3. `num_valid_H` are the valid pairs of each head, where the
host knows them; with None they are counted on the device, and the host waits for that too.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that select, N = B * T * H pairs in a flat list, C of a chunk, D
width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.weighting.cross_entropy import WeightedCrossEntropy, indices_of, rows_per_chunk, token_losses
from pipeline.weighting.selection import Selection, Selector


class HeadLosses(NamedTuple):
    """The losses of a micro-batch.

    loss: float32 scalar, this rank's part of the objective.
    policy_loss_BTH: float32, 0 at invalid pairs, without gradient.
    selection: of heads 1..., as the selector returned it.
    predicted_BTK: bool, the pairs that were predicted to be selected; None without a prediction.
    choices_BTH: int64, the token that each head finds most likely, 0 at invalid pairs; None where gradients are computed.
    """

    loss: Tensor
    policy_loss_BTH: Tensor
    selection: Selection
    predicted_BTK: Tensor | None = None
    choices_BTH: Tensor | None = None


def score_tokens(
    hidden_BTHD: Tensor,
    weight_VD: Tensor,
    targets_BTH: Tensor,
    valid_BTH: Tensor,
    num_valid_H: Sequence[int] | None = None,
    choices_N: Tensor | None = None,
) -> Tensor:
    """Compute the losses of all valid pairs without gradient, as `HeadLosses.policy_loss_BTH`. choices_N: int64, takes each
    pair's most likely token."""
    rows = indices_of(valid_BTH, None if num_valid_H is None else sum(num_valid_H))
    chunk_rows = _chunk_rows(targets_BTH, weight_VD)
    loss_N = token_losses(hidden_BTHD.flatten(0, 2), weight_VD, targets_BTH.flatten(), rows, chunk_rows, choices_N)
    return loss_N.view(valid_BTH.shape)


def chunked_losses(
    hidden_BTHD: Tensor,
    weight_VD: Tensor,
    targets_BTH: Tensor,
    valid_BTH: Tensor,
    selector: Selector,
    scale_H: Tensor,
    num_valid_H: Sequence[int] | None = None,
    predict: bool = True,
) -> HeadLosses:
    """Compute the losses, the selection, and the sum of the selected losses times `scale_H` (float32) of their head.

    Where autograd records nothing no gradient is computed either. `predict` False ignores the selector's prediction.
    """
    if not (torch.is_grad_enabled() and (hidden_BTHD.requires_grad or weight_VD.requires_grad)):
        choices_BTH = torch.zeros_like(targets_BTH)
        policy_loss_BTH = score_tokens(hidden_BTHD, weight_VD, targets_BTH, valid_BTH, num_valid_H, choices_BTH.view(-1))
        selection = selector.after_first_head(policy_loss_BTH[..., 0]).select(policy_loss_BTH[..., 1:])
        loss = _objective(policy_loss_BTH, _with_first_head(valid_BTH, selection.selected_BTK), scale_H)
        return HeadLosses(loss, policy_loss_BTH, selection, choices_BTH=choices_BTH)

    hidden_ND, shape = hidden_BTHD.flatten(0, 2), valid_BTH.shape
    with torch.no_grad():
        sums = WeightedCrossEntropy(
            hidden_ND,
            weight_VD,
            targets_BTH.flatten(),
            scale_H.expand(shape).flatten(),
            _chunk_rows(targets_BTH, weight_VD),
        )

        # Head 0 learns every valid pair, so its gradients are computed with its losses.
        first_BTH = _with_first_head(valid_BTH, torch.zeros_like(valid_BTH[..., 1:]))
        num_first, num_others = (None, None) if num_valid_H is None else (num_valid_H[0], sum(num_valid_H[1:]))
        sums.score(indices_of(first_BTH, num_first), take=1)
        selector = selector.after_first_head(sums.loss_N.view(shape)[..., 0])
        predictor = selector if predict and selector.predicts else None

        # Heads 1... are scored, with the gradients of the pairs that will probably be selected.
        others = indices_of(valid_BTH & ~first_BTH, num_others)
        sums.score(others, 0 if predictor is None else selector.share, predictor)

        # The exact selection, then the correction of what was predicted wrongly.
        policy_loss_BTH = sums.loss_N.view(shape)
        selection = selector.select(policy_loss_BTH[..., 1:])
        selected_BTH = _with_first_head(valid_BTH, selection.selected_BTK)
        predicted_BTK = None if predictor is None else sums.taken_N.view(shape)[..., 1:]
        sums.repair(selected_BTH.flatten())
        loss = _objective(policy_loss_BTH, selected_BTH, scale_H)
    return HeadLosses(sums.with_gradients(loss, hidden_ND, weight_VD), policy_loss_BTH, selection, predicted_BTK)


def dense_losses(
    hidden_BTHD: Tensor, weight_VD: Tensor, targets_BTH: Tensor, valid_BTH: Tensor, selector: Selector, scale_H: Tensor
) -> HeadLosses:
    """Compute the same by the formula, slowly: all logits of a head at once, and autograd."""
    losses, choices, weight_DV = [], [], weight_VD.float().T
    for hidden_BTD, targets_BT in zip(hidden_BTHD.unbind(2), targets_BTH.unbind(2), strict=True):
        logits_NV = hidden_BTD.flatten(0, 1).float() @ weight_DV
        losses.append(F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none").view(targets_BT.shape))
        choices.append(logits_NV.argmax(1).view(targets_BT.shape))
    policy_loss_BTH = torch.stack(losses, dim=-1).where(valid_BTH, 0.0)
    known_BTH = policy_loss_BTH.detach()
    selection = selector.after_first_head(known_BTH[..., 0]).select(known_BTH[..., 1:])
    loss = _objective(policy_loss_BTH, _with_first_head(valid_BTH, selection.selected_BTK), scale_H)
    choices_BTH = None if torch.is_grad_enabled() else torch.stack(choices, dim=-1).where(valid_BTH, 0)
    return HeadLosses(loss, policy_loss_BTH.detach(), selection, choices_BTH=choices_BTH)


def _chunk_rows(targets_BTH: Tensor, weight_VD: Tensor) -> int:
    return rows_per_chunk(targets_BTH[..., 0].numel(), len(weight_VD), weight_VD.device.type)


def _with_first_head(valid_BTH: Tensor, selected_BTK: Tensor) -> Tensor:
    """Add head 0, which takes every valid pair."""
    return torch.cat([valid_BTH[..., :1], selected_BTK], dim=-1)


def _objective(policy_loss_BTH: Tensor, selected_BTH: Tensor, scale_H: Tensor) -> Tensor:
    """Sum the selected losses that are finite; one that is not is found by `SelectionSums` and discards the step."""
    return (policy_loss_BTH.where(selected_BTH & policy_loss_BTH.isfinite(), 0.0) * scale_H).sum()
