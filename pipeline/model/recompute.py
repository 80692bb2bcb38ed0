"""Activation checkpointing (arXiv 1604.06174): save fewer activations in forward and recompute the others in backward.

    none       save all
    selective  save the outputs of matrix products and attention, recompute what lies between them (norms, RoPE, SwiGLU's
               product): about half the memory of `none`, a few per cent more time
    full       save only each block's input and run its forward again in backward: a third more work

The gradient is the same to the bit, on CUDA but for rounding: there `selective` runs RoPE and SwiGLU's product uncompiled
(`elementwise`). Each block is checkpointed by itself, the heads' blocks too.

`selective` identifies a saved output by its operation and its turn among that operation's calls. torch's own
`create_selective_checkpoint_contexts` counts all operations, saved or not, and raises if the second forward differs from the
first. Under ZeRO-3 it does differ: DeepSpeed gathers weights along the way, grouped otherwise than in the first forward.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

RunBlock = Callable[..., Tensor]
"""(block, *inputs) -> the block's output."""

SAVED_OPERATIONS = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
}
"""Names of the operations whose outputs `selective` saves: names, because importing the last takes a second."""


def block_runner(kind: str) -> RunBlock:
    """The function that runs a block under `none`, `selective` or `full` checkpointing."""
    if kind == "none":
        return lambda block, *inputs: block(*inputs)
    if kind == "full":
        return partial(checkpoint, use_reentrant=False)
    return partial(checkpoint, use_reentrant=False, context_fn=_save_and_reuse)


def _save_and_reuse() -> tuple["_SaveOutputs", "_ReuseOutputs"]:
    """The contexts of a block's forward and of its recomputation, which share the saved outputs."""
    outputs: dict[Any, deque[Any]] = defaultdict(deque)
    return _SaveOutputs(outputs), _ReuseOutputs(outputs)


class _SaveOutputs(TorchDispatchMode):
    """Saves the outputs of `SAVED_OPERATIONS` during forward."""

    def __init__(self, outputs: dict[Any, deque[Any]]):
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function.name() in SAVED_OPERATIONS:
            # Detached: the output's graph refers to this mode, which would refer to the output, and neither would be freed.
            self.outputs[function].append(tree_map_only(Tensor, Tensor.detach, output))
        return output


class _ReuseOutputs(TorchDispatchMode):
    """Returns the saved outputs, in the order they were saved, instead of computing them again."""

    def __init__(self, outputs: dict[Any, deque[Any]]):
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.outputs[function].popleft() if function.name() in SAVED_OPERATIONS else function(*args, **(kwargs or {}))
