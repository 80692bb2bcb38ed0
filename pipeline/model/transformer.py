"""A Llama-family transformer block in plain torch: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Switches cover its relatives: bias on the query, key and value projections (Qwen2), on the output projection and the
feed-forward layer too (some Llamas), RMSNorm on queries and keys (Qwen3). RoPE uses the half-rotation layout of Hugging Face
checkpoints, so their weights load unchanged.

Attention is causal within a document. Where the device has flash attention it runs over the documents' spans; elsewhere a
boolean mask is built once per forward. A padding position attends to the padding before it (flash) or to itself (mask); no
other position attends to padding, so its output reaches nothing.

Shapes: B rows, T tokens, D width, N attention heads, G key-value heads, K width of an attention head, P = B * T.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import Spans
from pipeline.model.elementwise import EAGER, Elementwise
from pipeline.model.key_values import KeyValues
from pipeline.model.rotary import attention_factor, scaled_frequencies

Documents = Tensor | Spans | KeyValues
"""A `document_mask`, spans for flash attention, or the keys and values of earlier tokens of one document."""


@cache
def flash_kernel() -> tuple[Callable[..., Any], bool]:
    """Return torch's flash attention over spans, and whether it takes fewer key-value heads than query heads (2.11's does not).

    It is imported where it is first used: that takes more than a second, for which a CPU need not wait.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention_head_dim(settings: ModelSettings) -> int:
    """K, width of an attention head."""
    return settings.head_dim or settings.dim // settings.num_attention_heads


def ffn_dim(settings: ModelSettings) -> int:
    """Width of the SwiGLU layer; by default 8/3 of the model's, rounded up to a multiple of 64."""
    return settings.ffn_dim or -(-8 * settings.dim // (3 * 64)) * 64


def document_mask(document_ids_BT: Tensor) -> Tensor:
    """Attention mask, bool [B, 1, T, T]: True where query t may see key s, i.e. s <= t in the same document, or s = t.

    document_ids_BT: int32, -1 on padding.
    """
    num_tokens = document_ids_BT.shape[1]
    same_document = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    present = (document_ids_BT >= 0)[:, :, None]
    itself = torch.eye(num_tokens, dtype=torch.bool, device=document_ids_BT.device)
    return ((same_document & present).tril() | itself)[:, None]


def can_use_flash(hidden_BTD: Tensor, settings: ModelSettings) -> bool:
    """True if flash attention supports these hidden states.

    It needs bf16 or fp16, compute capability 8.0 (Ampere) or newer, and attention heads of a width <= 256 that 8 divides. On
    8.6 to 8.9 and 12 (RTX 30, 40 and 50, A10, L4) its backward refuses widths above 192 (torch's `sdp_utils.cpp`).
    """
    width = attention_head_dim(settings)
    if not hidden_BTD.is_cuda or hidden_BTD.dtype not in (torch.bfloat16, torch.float16) or width > 256 or width % 8:
        return False
    capability = torch.cuda.get_device_capability(hidden_BTD.device)
    has_little_shared_memory = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return capability >= (8, 0) and (width <= 192 or not has_little_shared_memory)


def flash_attention(query_BTNK: Tensor, key_BTGK: Tensor, value_BTGK: Tensor, spans: Spans) -> Tensor:
    """Causal attention within spans by torch's `varlen_attn`; returns [B, T, N, K].

    spans: boundaries of the documents in the flattened [B * T] positions, and the length of the longest.
    """
    query_PNK, key_PGK, value_PGK = query_BTNK.flatten(0, 1), key_BTGK.flatten(0, 1), value_BTGK.flatten(0, 1)

    varlen_attn, takes_groups = flash_kernel()

    # Grouped-query attention; torch 2.11 needs a copy of each key and value per query head.
    options: dict[str, Any] = {}
    groups = query_PNK.shape[1] // key_PGK.shape[1]
    if groups > 1 and takes_groups:
        options = {"enable_gqa": True}
    elif groups > 1:
        key_PGK, value_PGK = key_PGK.repeat_interleave(groups, dim=1), value_PGK.repeat_interleave(groups, dim=1)

    # window_size (-1, 0) is causal: all keys to the left, none to the right.
    starts_S, longest = spans
    attended_PNK: Any = varlen_attn(
        query_PNK, key_PGK, value_PGK, starts_S, starts_S, longest, longest, window_size=(-1, 0), **options
    )
    attended_BTNK: Tensor = attended_PNK.view(query_BTNK.shape)
    return attended_BTNK


def masked_attention(query_BTNK: Tensor, key_BTGK: Tensor, value_BTGK: Tensor, mask: Tensor) -> Tensor:
    """Attention under a `document_mask` by torch's scaled-dot-product attention; returns [B, T, N, K]."""
    query_BNTK, key_BGTK, value_BGTK = (tensor.transpose(1, 2) for tensor in (query_BTNK, key_BTGK, value_BTGK))
    groups = query_BNTK.shape[1] // key_BGTK.shape[1]
    if groups > 1 and not mask_takes_groups(query_BNTK):
        key_BGTK, value_BGTK = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_BGTK, value_BGTK))
    grouped = query_BNTK.shape[1] != key_BGTK.shape[1]
    attended_BNTK = F.scaled_dot_product_attention(query_BNTK, key_BGTK, value_BGTK, attn_mask=mask, enable_gqa=grouped)
    return attended_BNTK.transpose(1, 2)


def mask_takes_groups(query_BNTK: Tensor) -> bool:
    """False on CUDA, where no fused kernel takes a mask together with fewer key-value heads than query heads.

    torch would compute the whole [T, T] scores instead, which costs far more than a copy of keys and values per query head.
    """
    return not query_BNTK.is_cuda


def rotary_angles(num_tokens: int, settings: ModelSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin), float32 [T, 1, K], times YaRN's attention factor if there is one.

    Positions count from the start of the row, not of the document: attention depends on differences of positions only.
    """
    scaling = settings.rope_scaling
    frequencies = scaled_frequencies(settings.rope_theta, attention_head_dim(settings), scaling, device)
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
    return angles.cos() * attention_factor(scaling), angles.sin() * attention_factor(scaling)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with RoPE, causal within documents."""

    def __init__(self, settings: ModelSettings, elementwise: Elementwise):
        super().__init__()
        self.rotate = elementwise.rotate
        self.head_dim = attention_head_dim(settings)
        num_key_value_heads = settings.num_key_value_heads or settings.num_attention_heads
        query_dim, key_dim = settings.num_attention_heads * self.head_dim, num_key_value_heads * self.head_dim
        self.query = nn.Linear(settings.dim, query_dim, bias=settings.attention_bias)
        self.key = nn.Linear(settings.dim, key_dim, bias=settings.attention_bias)
        self.value = nn.Linear(settings.dim, key_dim, bias=settings.attention_bias)
        self.output = nn.Linear(query_dim, settings.dim, bias=settings.attention_output_bias)
        if settings.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, settings.norm_eps)
            self.key_norm = RMSNorm(self.head_dim, settings.norm_eps)
        self.qk_norm = settings.qk_norm

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        query_BTNK, key_BTGK, value_BTGK = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        # RoPE comes after the norm of queries and keys, as in Qwen3.
        if self.qk_norm:
            query_BTNK, key_BTGK = self.query_norm(query_BTNK), self.key_norm(key_BTGK)
        query_BTNK, key_BTGK = self.rotate(query_BTNK, angles), self.rotate(key_BTGK, angles)

        if isinstance(documents, Spans):
            attended_BTNK = flash_attention(query_BTNK, key_BTGK, value_BTGK, documents)
        elif isinstance(documents, KeyValues):
            attended_BTNK = masked_attention(query_BTNK, *documents.extended(key_BTGK, value_BTGK), documents.places.mask_B1SE)
        else:
            attended_BTNK = masked_attention(query_BTNK, key_BTGK, value_BTGK, documents)
        return self.output(attended_BTNK.flatten(2))


class SwiGLU(nn.Module):
    """Feed-forward layer (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, settings: ModelSettings, elementwise: Elementwise):
        super().__init__()
        self.gated = elementwise.gated
        self.gate = nn.Linear(settings.dim, ffn_dim(settings), bias=settings.mlp_bias)
        self.up = nn.Linear(settings.dim, ffn_dim(settings), bias=settings.mlp_bias)
        self.down = nn.Linear(ffn_dim(settings), settings.dim, bias=settings.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x_BTD), self.up(x_BTD)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream. [B, T, D] -> [B, T, D]."""

    def __init__(self, settings: ModelSettings, elementwise: Elementwise = EAGER):
        super().__init__()
        self.attention_norm = RMSNorm(settings.dim, settings.norm_eps)
        self.attention = Attention(settings, elementwise)
        self.ffn_norm = RMSNorm(settings.dim, settings.norm_eps)
        self.ffn = SwiGLU(settings, elementwise)

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, documents)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))
