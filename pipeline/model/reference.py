"""The frozen reference model: one forward a micro-batch, its cross-entropy computed once, then only indexed.

A next-token reference gives the loss of token j given all tokens before it; head h at position t predicts token
t + 1 + h, so reference_loss_BTH[b, t, h] is that token's loss (the *shifted* reference, arXiv 2404.07965's quantity at
each head's target). A reference with the policy's heads can be asked head by head instead (*matched*): then both saw the same
context, up to position t.

Shapes: B rows, T tokens, H heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.weighting.selection import shifted_reference_loss

Reference = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A scoring forward: (tokens_BT, document_ids_BT, targets, valid) -> losses, [B, T, 1] or with all heads [B, T, H]."""


def reference_columns(
    reference: Reference, horizon: str, tokens_BT: Tensor, document_ids_BT: Tensor, targets_BTH: Tensor, valid_BTH: Tensor
) -> Tensor:
    """What the reference computes, float32 [B, T, C]: each token's loss (`shifted`, C = 1), or the losses of its own heads
    (`matched`, C = H)."""
    with torch.inference_mode():
        if horizon == "matched":
            return reference(tokens_BT, document_ids_BT, targets_BTH, valid_BTH)
        next_token_BT1 = reference(tokens_BT, document_ids_BT, targets_BTH[..., :1], valid_BTH[..., :1])
        return F.pad(next_token_BT1[:, :-1], (0, 0, 1, 0))


def losses_by_head(columns_BTC: Tensor, horizon: str, num_heads: int) -> Tensor:
    """float32 [B, T, H] from `reference_columns`; meaningful at valid pairs."""
    return columns_BTC if horizon == "matched" else shifted_reference_loss(columns_BTC[..., 0], num_heads)
