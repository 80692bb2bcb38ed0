"""Activation checkpointing: which of a block's activations wait for backward, and which are made again.

    none       all are kept
    selective  the outputs of matrix products and attention are kept, what lies between them (norms, rotations, SwiGLU's
               product) is made again: about half the memory of `none` for a few per cent of the time
    full       a block's input alone is kept, its forward runs once more in backward (arXiv 1604.06174): a third more work

The gradient is the same to the bit. Each block is a unit of its own, heads among them.

What `selective` keeps is found again by its operation and its turn among that operation's calls. torch's own
`create_selective_checkpoint_contexts` counts all operations, kept or not, and stops where the second forward differs from the
first; under ZeRO-3 it does, because DeepSpeed gathers weights on the way, in other portions than in forward.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

RunBlock = Callable[..., Tensor]
"""(block, *inputs) -> what the block gives."""

_aten: Any = torch.ops.aten
SAVED_OPERATIONS = [
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
    return partial(checkpoint, use_reentrant=False, context_fn=_save_and_reuse)


def _save_and_reuse() -> tuple["_SaveOutputs", "_ReuseOutputs"]:
    """What surrounds a block's first forward, and its second."""
    outputs: dict[Any, deque[Any]] = defaultdict(deque)
    return _SaveOutputs(outputs), _ReuseOutputs(outputs)


class _SaveOutputs(TorchDispatchMode):
    def __init__(self, outputs: dict[Any, deque[Any]]):
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in SAVED_OPERATIONS:
            # Without its graph, which would hold this and be held by it.
            self.outputs[function].append(tree_map_only(Tensor, Tensor.detach, output))
        return output


class _ReuseOutputs(TorchDispatchMode):
    def __init__(self, outputs: dict[Any, deque[Any]]):
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.outputs[function].popleft() if function in SAVED_OPERATIONS else function(*args, **(kwargs or {}))
