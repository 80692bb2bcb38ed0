"""From logits to tokens, and the verification of drafts (speculative sampling, arXiv 2211.17192, 2302.01318).

A draft d, drawn from q, is accepted with probability min(1, p(d) / q(d)), where p is what head 0 would draw from; the first
that is not is replaced by a draw from the rest, max(p − q, 0) / Σ max(p − q, 0). So each token is distributed as a draw from p:

    q(x) · min(1, p(x) / q(x)) + P(rejected) · rest(x) = min(q(x), p(x)) + max(p(x) − q(x), 0) = p(x)

Greedy decoding is the case in which p and q have all their mass on one token: a draft is accepted if it is head 0's choice.

Shapes: B rows, K drafts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_TEMPERATURE = 1e-30  # less is zero in float32


@dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are drawn.

    temperature: that logits are divided by; 0 takes the likeliest token.
    top_p: the smallest set of tokens with at least this probability is drawn from (nucleus sampling, arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what tokens are drawn from, float32 [..., V]."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # Differences from the largest stay finite or become -inf, however small the temperature.
        differences = logits - logits.amax(-1, keepdim=True)
        probabilities = (differences / max(self.temperature, _LEAST_TEMPERATURE)).softmax(-1)
        return probabilities if self.top_p >= 1 else self._nucleus(probabilities)

    def _nucleus(self, probabilities: Tensor) -> Tensor:
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it do not have the probability yet; the likeliest always is.
        kept = ordered.where(ordered.cumsum(-1) - ordered < self.top_p, 0.0)
        return torch.zeros_like(probabilities).scatter_(-1, tokens, kept / kept.sum(-1, keepdim=True))


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from each distribution: [..., V] -> int64 [...]."""
    if probabilities.numel() == 0:
        return torch.zeros(probabilities.shape[:-1], dtype=torch.int64, device=probabilities.device)
    return torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])


def verify(p_BSV: Tensor, q_BKV: Tensor, drafts_BK: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Verify drafts in their order.

    Args:
        p_BSV: S = K + 1 distributions of head 0: of each draft's place, given the drafts before it, and of the place after all.
        q_BKV: that the drafts were drawn from.
        drafts_BK: int64.
        generator: of random numbers, on the tensors' device.

    Returns:
        How many drafts are accepted, and the token after them; int64 [B] both.
    """
    rows_B = torch.arange(len(p_BSV), device=p_BSV.device)

    # u < p / q, without the division.
    p_BK, q_BK = (of.gather(-1, drafts_BK[..., None])[..., 0] for of in (p_BSV[:, :-1], q_BKV))
    uniform_BK = torch.rand(drafts_BK.shape, generator=generator, device=drafts_BK.device)
    accepted_B = (uniform_BK * q_BK < p_BK).long().cumprod(1).sum(1)

    # What was not accepted was drawn from q; after all drafts nothing was drawn.
    q_BSV = torch.cat([q_BKV, torch.zeros_like(p_BSV[:, :1])], dim=1)
    p_BV, q_BV = p_BSV[rows_B, accepted_B], q_BSV[rows_B, accepted_B]
    rest_BV = (p_BV - q_BV).clamp(min=0)
    mass_B1 = rest_BV.sum(-1, keepdim=True)
    # Where p and q are equal up to rounding nothing may be left.
    return accepted_B, draw(torch.where(mass_B1 > 0, rest_BV, p_BV), generator)
