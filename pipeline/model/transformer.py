"""The Llama family's block in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Switches cover its relatives: bias on the query, key and value projections (Qwen2), RMSNorm on queries and keys
(Qwen3). Rotary positions use the half-rotation layout of Hugging Face checkpoints, so that their weights load as they
are. Attention is confined to a document: by flash attention over the documents' spans where a device has it (a padding
position then attends to the padding before it), elsewhere by a mask made once a forward (to itself). What becomes of a
padding position reaches nothing else.

Shapes: B rows, T tokens, D width, N attention heads, G key-value heads, K width of an attention head, P = B * T.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import Spans
from pipeline.model.elementwise import EAGER, Elementwise

Documents = Tensor | Spans
"""A `document_mask`, or spans for flash attention."""

# torch 2.11 wants as many key-value heads as query heads.
FLASH_SUPPORTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention_head_dim(settings: ModelSettings) -> int:
    return settings.head_dim or settings.dim // settings.num_attention_heads


def ffn_dim(settings: ModelSettings) -> int:
    return settings.ffn_dim or -(-8 * settings.dim // (3 * 64)) * 64


def document_mask(document_ids_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T], true where query t may see key s: s <= t, both in one document, or s = t."""
    num_tokens = document_ids_BT.shape[1]
    same_document = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    present = (document_ids_BT >= 0)[:, :, None]
    itself = torch.eye(num_tokens, dtype=torch.bool, device=document_ids_BT.device)
    return ((same_document & present).tril() | itself)[:, None]


def can_use_flash(hidden_BTD: Tensor, settings: ModelSettings) -> bool:
    """Whether flash attention takes such hidden states: half precision on a GPU of compute capability 8 or more (Ampere),
    attention heads that are not too wide."""
    width = attention_head_dim(settings)
    if not hidden_BTD.is_cuda or hidden_BTD.dtype not in (torch.bfloat16, torch.float16) or width > 256 or width % 8:
        return False
    return torch.cuda.get_device_capability(hidden_BTD.device)[0] >= 8


def flash_attention(query_BTNK: Tensor, key_BTGK: Tensor, value_BTGK: Tensor, spans: Spans) -> Tensor:
    """[B, T, N, K]: each query attends to the keys of its span up to its own."""
    query_PNK, key_PGK, value_PGK = query_BTNK.flatten(0, 1), key_BTGK.flatten(0, 1), value_BTGK.flatten(0, 1)
    options: dict[str, Any] = {}
    groups = query_PNK.shape[1] // key_PGK.shape[1]
    if groups > 1 and FLASH_SUPPORTS_GQA:
        options = {"enable_gqa": True}
    elif groups > 1:
        key_PGK, value_PGK = key_PGK.repeat_interleave(groups, dim=1), value_PGK.repeat_interleave(groups, dim=1)
    starts_S, longest = spans
    attended_PNK: Any = varlen_attn(
        query_PNK, key_PGK, value_PGK, starts_S, starts_S, longest, longest, window_size=(-1, 0), **options
    )
    attended_BTNK: Tensor = attended_PNK.view(query_BTNK.shape)
    return attended_BTNK


def masked_attention(query_BTNK: Tensor, key_BTGK: Tensor, value_BTGK: Tensor, mask: Tensor) -> Tensor:
    """[B, T, N, K]: each query attends to the keys that the mask lets it see."""
    query_BNTK, key_BGTK, value_BGTK = (tensor.transpose(1, 2) for tensor in (query_BTNK, key_BTGK, value_BTGK))
    grouped = query_BNTK.shape[1] != key_BGTK.shape[1]
    attended_BNTK = F.scaled_dot_product_attention(query_BNTK, key_BGTK, value_BGTK, attn_mask=mask, enable_gqa=grouped)
    return attended_BNTK.transpose(1, 2)


def rotary_angles(num_tokens: int, settings: ModelSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [T, 1, K]. Only differences of positions matter, so documents need no restart."""
    width = attention_head_dim(settings)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, settings.rope_theta**-exponents).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, settings: ModelSettings, elementwise: Elementwise):
        super().__init__()
        self.rotate = elementwise.rotate
        self.head_dim = attention_head_dim(settings)
        num_key_value_heads = settings.num_key_value_heads or settings.num_attention_heads
        query_dim, key_dim = settings.num_attention_heads * self.head_dim, num_key_value_heads * self.head_dim
        self.query = nn.Linear(settings.dim, query_dim, bias=settings.attention_bias)
        self.key = nn.Linear(settings.dim, key_dim, bias=settings.attention_bias)
        self.value = nn.Linear(settings.dim, key_dim, bias=settings.attention_bias)
        self.output = nn.Linear(query_dim, settings.dim, bias=False)
        if settings.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, settings.norm_eps)
            self.key_norm = RMSNorm(self.head_dim, settings.norm_eps)
        self.qk_norm = settings.qk_norm

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        query_BTNK, key_BTGK, value_BTGK = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            query_BTNK, key_BTGK = self.query_norm(query_BTNK), self.key_norm(key_BTGK)
        query_BTNK, key_BTGK = self.rotate(query_BTNK, angles), self.rotate(key_BTGK, angles)
        if isinstance(documents, Spans):
            attended_BTNK = flash_attention(query_BTNK, key_BTGK, value_BTGK, documents)
        else:
            attended_BTNK = masked_attention(query_BTNK, key_BTGK, value_BTGK, documents)
        return self.output(attended_BTNK.flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, settings: ModelSettings, elementwise: Elementwise):
        super().__init__()
        self.gated = elementwise.gated
        self.gate = nn.Linear(settings.dim, ffn_dim(settings), bias=False)
        self.up = nn.Linear(settings.dim, ffn_dim(settings), bias=False)
        self.down = nn.Linear(ffn_dim(settings), settings.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x_BTD), self.up(x_BTD)))


class Block(nn.Module):
    def __init__(self, settings: ModelSettings, elementwise: Elementwise = EAGER):
        super().__init__()
        self.attention_norm = RMSNorm(settings.dim, settings.norm_eps)
        self.attention = Attention(settings, elementwise)
        self.ffn_norm = RMSNorm(settings.dim, settings.norm_eps)
        self.ffn = SwiGLU(settings, elementwise)

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, documents)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))
