"""The Llama family's block in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Switches cover its relatives: bias on the query, key and value projections (Qwen2), RMSNorm on queries and keys
(Qwen3). Rotary positions use the half-rotation layout of Hugging Face checkpoints, so that their weights load as they
are. Attention is confined to a document by a mask made once a forward; a padding position attends to itself.

Shapes: B rows, T tokens, D width, N attention heads, G key-value heads, K width of an attention head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ModelSettings


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


def rotary_angles(num_tokens: int, settings: ModelSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [T, K]. Only differences of positions matter, so documents need no restart."""
    width = attention_head_dim(settings)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, settings.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BNTK: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos_TK, sin_TK = angles
    first, second = x_BNTK.float().chunk(2, dim=-1)
    rotated = x_BNTK.float() * cos_TK + torch.cat([-second, first], dim=-1) * sin_TK
    return rotated.to(x_BNTK.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, settings: ModelSettings):
        super().__init__()
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
        self.grouped = num_key_value_heads != settings.num_attention_heads

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        query_BNTK = self._split(self.query(x_BTD))
        key_BGTK, value_BGTK = self._split(self.key(x_BTD)), self._split(self.value(x_BTD))
        if self.qk_norm:
            query_BNTK, key_BGTK = self.query_norm(query_BNTK), self.key_norm(key_BGTK)
        query_BNTK, key_BGTK = rotate(query_BNTK, angles), rotate(key_BGTK, angles)
        attended_BNTK = F.scaled_dot_product_attention(
            query_BNTK, key_BGTK, value_BGTK, attn_mask=mask, enable_gqa=self.grouped
        )
        return self.output(attended_BNTK.transpose(1, 2).flatten(2))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.gate = nn.Linear(settings.dim, ffn_dim(settings), bias=False)
        self.up = nn.Linear(settings.dim, ffn_dim(settings), bias=False)
        self.down = nn.Linear(ffn_dim(settings), settings.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.attention_norm = RMSNorm(settings.dim, settings.norm_eps)
        self.attention = Attention(settings)
        self.ffn_norm = RMSNorm(settings.dim, settings.norm_eps)
        self.ffn = SwiGLU(settings)

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, mask)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))
