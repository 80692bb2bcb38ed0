"""Losses of the frozen reference model: one forward per micro-batch, its cross-entropy computed once, then only indexed.

*Shifted* (the default): a next-token reference gives the loss of token j given tokens < j (arXiv 2404.07965). Head h at
position t predicts token t+1+h, so

    reference_loss_BTH[b, t, h] = reference_token_loss_BT[b, t + 1 + h]

*Matched*: a reference with as many heads as the policy is compared head by head, so both saw the same context, tokens <= t.

Shapes: B rows, T tokens, H heads, C columns of losses: 1 (shifted) or H (matched).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.loading.batch import Spans
from pipeline.weighting.selection import shifted_reference_loss

Reference = Callable[..., Tensor]
"""A scoring forward: (tokens_BT, document_ids_BT, targets, valid, spans=, num_valid_H=) -> losses, float32 [B, T, 1] or
[B, T, H]."""


def reference_columns(
    reference: Reference,
    horizon: str,
    tokens_BT: Tensor,
    document_ids_BT: Tensor,
    targets_BTH: Tensor,
    valid_BTH: Tensor,
    spans: Spans | None = None,
    num_valid_H: Sequence[int] | None = None,
) -> Tensor:
    """Run the reference without gradient; returns float32 [B, T, C].

    Shifted: column 0 at [b, j] is the loss of token j given tokens < j, 0 at j = 0. Matched: column h at [b, t] is the loss of
    the reference's head h at position t.
    """
    with torch.inference_mode():
        heads = targets_BTH.shape[-1] if horizon == "matched" else 1
        losses_BTC = reference(
            tokens_BT,
            document_ids_BT,
            targets_BTH[..., :heads],
            valid_BTH[..., :heads],
            spans=spans,
            num_valid_H=None if num_valid_H is None else num_valid_H[:heads],
        )
        return losses_BTC if horizon == "matched" else F.pad(losses_BTC[:, :-1], (0, 0, 1, 0))


def losses_by_head(columns_BTC: Tensor, horizon: str, num_heads: int) -> Tensor:
    """Index the result of `reference_columns` by head: float32 [B, T, H], meaningful at valid pairs only."""
    return columns_BTC if horizon == "matched" else shifted_reference_loss(columns_BTC[..., 0], num_heads)
