"""RoPE's frequencies (arXiv 2104.09864), plain or scaled for longer rows: `linear`, `llama3`, `yarn`.

The formulas and their defaults are those of transformers 5 (`modeling_rope_utils.py`), so that a folder means the same here as
there. The frequency of pair i of an attention head of width K is θ^(-2i/K), one of K/2.
"""

import math

import torch
from torch import Tensor

from pipeline.rope_settings import Linear, Llama3, RopeScaling, Yarn


def scaled_frequencies(theta: float, width: int, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians a position of each pair of a head, float32 [width / 2]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    plain = theta**-exponents
    if isinstance(scaling, Linear):
        return plain / scaling.factor
    if isinstance(scaling, Llama3):
        return _llama3(plain, scaling)
    if isinstance(scaling, Yarn):
        return _yarn(plain, theta, scaling)
    return plain


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor of cos and sin: YaRN's 0.1 ln(factor) + 1, unless the model says another; 1 for other kinds."""
    if not isinstance(scaling, Yarn):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _llama3(plain: Tensor, scaling: Llama3) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend those between (Llama 3.1).

    turns = original positions / wavelength;   s = (turns - low) / (high - low), cut to [0, 1]
    frequency = (1 - s) plain / factor + s plain
    """
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain


def _yarn(plain: Tensor, theta: float, scaling: Yarn) -> Tensor:
    """Divide frequencies of few turns over the original positions by the factor, keep those of many (arXiv 2309.00071).

    Between the pairs of `beta_fast` and `beta_slow` turns the share that is kept falls linearly with the pair's number.
    """
    pairs = len(plain)
    first, last = (_pair_of(turns, theta, 2 * pairs, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)

    width = 0.001 if first == last else last - first
    number = torch.arange(pairs, dtype=torch.float32, device=plain.device)
    divided = ((number - first) / width).clamp(0, 1)
    return divided * plain / scaling.factor + (1 - divided) * plain


def _pair_of(turns: float, theta: float, width: int, scaling: Yarn) -> float:
    """The number of the pair, not whole, that turns so many times over the original positions."""
    return width * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
