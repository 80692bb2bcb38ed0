"""A model with the keys and values of the tokens that it has seen: a forward computes the new ones alone.

Every head is a block with attention of its own, so each has keys and values of its own, for the same positions.

Shapes: B rows, S new tokens a row, H heads, D width, V vocabulary, C positions, K width of an attention head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.key_values import KeyValues, places_of
from pipeline.model.mtp import MTPModel
from pipeline.model.transformer import attention_head_dim, rotary_angles


class CachedModel:
    """A model that continues `num_rows` texts.

    capacity: C, the positions that a text may come to have.
    num_heads: prediction heads that are run; 1 for plain decoding.
    """

    def __init__(self, model: MTPModel, num_rows: int, capacity: int, num_heads: int):
        self.model = model
        self.heads = list(model.heads)[:num_heads]
        settings, weight = model.settings, model.embed.weight
        groups = settings.num_key_value_heads or settings.num_attention_heads
        shape = (2, num_rows, capacity, groups, attention_head_dim(settings))
        self._keys_values = {id(block): weight.new_zeros(shape) for block in [*model.trunk, *self.heads]}
        self._cos_C1K, self._sin_C1K = rotary_angles(capacity, settings, weight.device)

    def hidden_states(self, tokens_BS: Tensor, starts: list[int]) -> Tensor:
        """Run new tokens; returns each head's output before the final norm, [B, S, H, D].

        starts: the position of each row's first new token. What was at these positions, and after them, is forgotten.
        """
        places = places_of(starts, tokens_BS.shape[1], tokens_BS.device)
        angles = self._cos_C1K[places.positions_BS], self._sin_C1K[places.positions_BS]

        def run(block: nn.Module, hidden_BSD: Tensor) -> Tensor:
            keys_BCGK, values_BCGK = self._keys_values[id(block)]
            return block(hidden_BSD, angles, KeyValues(keys_BCGK, values_BCGK, places))

        hidden_BSD = self.model.embed(tokens_BS)
        for block in self.model.trunk:
            hidden_BSD = run(block, hidden_BSD)
        return torch.stack([run(head, hidden_BSD) for head in self.heads], dim=2)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the unembedding: [..., D] -> float32 [..., V]."""
        return functional.linear(self.model.unembed.norm(hidden), self.model.unembed.weight).float()
