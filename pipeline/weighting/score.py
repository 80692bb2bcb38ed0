"""The scores by which pairs compete to be selected.

    excess       policy loss - reference loss, signed: Rho-1's quantity (arXiv 2404.07965), the default
    external     the user's own score of the pair's target
    policy_loss  the hardest pairs, without a reference
    random       any pairs, the control of an experiment

The reference's loss may be the policy's own: that of its head 0 (`Comparison.after_first_head`).

All go through the same exact selection. A policy loss that is not finite makes the score NaN whichever competes, so that the
selection sees it.

Shapes: B rows, T tokens, K = H - 1 the heads that select, P some pairs in a flat list.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.weighting.selection import shifted_reference_loss


@dataclass(frozen=True)
class Comparison:
    """The values by which the pairs of one micro-batch compete.

    score: as `training.selection_score`.
    valid_BTK: bool.
    reference_loss_BTK: float32; None without a reference, or where it is not known yet.
    given_BTK: float32, scores that no loss takes part in: random or external ones; None for the others.
    is_own: true if the policy's head 0 is the reference, whose losses `after_first_head` fills in.
    """

    score: str
    valid_BTK: Tensor
    reference_loss_BTK: Tensor | None
    given_BTK: Tensor | None
    is_own: bool = False

    def after_first_head(self, first_loss_BT: Tensor) -> "Comparison":
        """Fill in the policy's own losses of head 0 (float32, at the positions that predict), if they are the reference's:

        reference_loss_BTH[b, t, h] = first_loss_BT[b, t + h], which are two losses of one target.
        """
        if not self.is_own:
            return self
        token_loss_BT = functional.pad(first_loss_BT[:, :-1], (1, 0))
        loss_BTH = shifted_reference_loss(token_loss_BT, self.valid_BTK.shape[-1] + 1)
        return replace(self, reference_loss_BTK=loss_BTH[..., 1:])

    def scores(self, policy_loss_BTK: Tensor) -> Tensor:
        """Score every pair, float32 [B, T, K]; meaningful where a pair is valid."""
        return score(self.score, policy_loss_BTK, self.reference_loss_BTK, self.given_BTK)

    def scores_at(self, policy_loss_P: Tensor, indices_P: Tensor) -> Tensor:
        """Score some pairs, given by their indices into the flattened [B, T, K] (int64)."""
        reference_loss_P, given_P = (
            None if table_BTK is None else table_BTK.take(indices_P) for table_BTK in (self.reference_loss_BTK, self.given_BTK)
        )
        return score(self.score, policy_loss_P, reference_loss_P, given_P)

    def excess(self, policy_loss_BTK: Tensor) -> Tensor | None:
        """Excess losses, float32 [B, T, K], 0 at invalid pairs; None without a reference.

        One that is not finite says which loss was not: inf the policy's, -inf the reference's, NaN both.
        """
        if self.reference_loss_BTK is None:
            return None
        policy, reference = (loss.where(loss.isfinite(), torch.inf) for loss in (policy_loss_BTK, self.reference_loss_BTK))
        return (policy - reference).where(self.valid_BTK, 0.0)


def score(name: str, policy_loss: Tensor, reference_loss: Tensor | None, given: Tensor | None) -> Tensor:
    """The named score of pairs, from tensors of one shape."""
    if name == "policy_loss":
        return policy_loss
    if name == "excess":
        assert reference_loss is not None
        competing = policy_loss - reference_loss
    else:
        assert given is not None
        competing = given
    return torch.where(torch.isfinite(policy_loss), competing, torch.nan)


def random_scores(seed: int, rows_B: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    """Draw float32 [B, T, K], uniform in [0, 1), from the seed and each pair's row, position and head alone.

    `rows_B` (int64) numbers the rows over the whole run, so that any number of ranks draws the same.
    """
    index_BTK = (rows_B[:, None, None] * num_tokens + torch.arange(num_tokens, device=rows_B.device)[:, None]) * num_heads
    index_BTK = index_BTK + torch.arange(num_heads, device=rows_B.device)

    # SplitMix64 from a start of the seed's own; int64 arithmetic wraps, and masks make the shifts logical.
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    mixed = index_BTK * _as_int64(0x9E3779B97F4A7C15) + _as_int64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * _as_int64(factor)
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))

    # The upper 24 bits, which float32 holds exactly.
    return ((mixed >> 40) & (2**24 - 1)).float() / 2**24


def _as_int64(number: int) -> int:
    """The signed integer with the lowest 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63
