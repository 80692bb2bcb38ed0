"""The frozen reference model: one forward a micro-batch, its cross-entropy computed once, then only indexed.

A next-token reference gives the loss of token j given all tokens before it; head h at position t predicts token
t + 1 + h, so reference_loss_BTH[b, t, h] is that token's loss (the *shifted* reference, arXiv 2404.07965's quantity at
each head's target). A reference with the policy's heads can be asked head by head instead (*matched*): then both saw the same
context, up to position t.

Shapes: B rows, T tokens, H heads.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.loading.batch import Spans
from pipeline.weighting.selection import shifted_reference_loss

Reference = Callable[..., Tensor]
"""A scoring forward: (tokens_BT, document_ids_BT, targets, valid, spans=, num_valid_H=) -> losses, [B, T, 1] or with all heads
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
    """What the reference computes, float32 [B, T, C]: each token's loss (`shifted`, C = 1), or the losses of its own heads
    (`matched`, C = H)."""
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
    """float32 [B, T, H] from `reference_columns`; meaningful at valid pairs."""
    return columns_BTC if horizon == "matched" else shifted_reference_loss(columns_BTC[..., 0], num_heads)
