"""Activation checkpointing: which of a block's activations wait for backward, and which are made again.

    none       all are kept
    selective  the outputs of matrix products and attention are kept, what lies between them (norms, rotations, SwiGLU's
               product) is made again: about half the memory of `none` for a few per cent of the time
    full       a block's input alone is kept, its forward runs once more in backward (arXiv 1604.06174): a third more work

The gradient is the same to the bit. Each block is a unit of its own, heads among them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

RunBlock = Callable[..., Tensor]
"""(block, *inputs) -> what the block gives."""

_aten: Any = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
]
"""Operations whose outputs `selective` keeps."""


def block_runner(kind: str) -> RunBlock:
    """How blocks are run under `none`, `selective` or `full`."""
    if kind == "none":
        return lambda block, *inputs: block(*inputs)
    if kind == "full":
        return partial(checkpoint, use_reentrant=False)
    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, KEPT))
