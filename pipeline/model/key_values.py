"""Keys and values of tokens that a model has seen, by which a forward computes new tokens alone.

They lie by position, and a query sees the positions up to its own. So tokens that are taken back need no removal: what comes at
their positions next is written over them before any query may see it. Rows may have different lengths in the same way.

Shapes: B rows, S new tokens a row, C positions, G key-value heads, K width of an attention head.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where the new tokens of a forward lie.

    rows_B1, positions_BS: int64. mask_B1SE: bool, True where a query may see a position; E positions, at most C, hold all that
    any query may see.
    """

    rows_B1: Tensor
    positions_BS: Tensor
    mask_B1SE: Tensor


def places_of(starts: list[int], num_tokens: int, device: torch.device) -> Places:
    """Place `num_tokens` new tokens a row, the first of each row at its start."""
    positions_BS = torch.tensor(starts, device=device)[:, None] + torch.arange(num_tokens, device=device)
    seen_E = torch.arange(max(starts) + num_tokens, device=device)
    return Places(torch.arange(len(starts), device=device)[:, None], positions_BS, (seen_E <= positions_BS[..., None])[:, None])


class KeyValues(NamedTuple):
    """One attention layer's keys and values [B, C, G, K], and the places of the forward in hand."""

    keys_BCGK: Tensor
    values_BCGK: Tensor
    places: Places

    def extended(self, key_BSGK: Tensor, value_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values; returns all that the mask tells of, [B, E, G, K]."""
        self.keys_BCGK[self.places.rows_B1, self.places.positions_BS] = key_BSGK
        self.values_BCGK[self.places.rows_B1, self.places.positions_BS] = value_BSGK
        end = self.places.mask_B1SE.shape[-1]
        return self.keys_BCGK[:, :end], self.values_BCGK[:, :end]
