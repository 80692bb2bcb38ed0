"""RoPE and SwiGLU's product, the elementwise functions of a block, compiled with torch.compile on CUDA.

Run eagerly, each makes several passes over the block's widest tensors. On an H200 (torch 2.11, bf16, D 2048, 16k tokens) a
block's forward and backward took 11.8 ms, of which the matrix products need 5.0 ms at the card's peak; with both functions
compiled it took 9.5 ms and a tenth less memory.

Only these leaf functions are compiled, not the block: ZeRO-3 gathers weights in hooks on modules, which torch.compile would
have to trace. A CPU gains nothing, and neither does RMSNorm, which is a single kernel already.

Shapes: B rows, T tokens, N attention heads, K width of an attention head.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Angles = tuple[Tensor, Tensor]
"""(cos, sin), float32 [T, 1, K]."""


class Elementwise(NamedTuple):
    """The elementwise functions of a block, eager or compiled.

    rotate: (x [B, T, N, K], angles) -> the same shape and dtype, see `rotate`.
    gated: (gate, up) -> silu(gate) * up, see `gated`.
    """

    rotate: Callable[[Tensor, Angles], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]


def rotate(x_BTNK: Tensor, angles: Angles) -> Tensor:
    """Apply RoPE (arXiv 2104.09864) in the half-rotation layout, in float32, rounded once at the end.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)    with x1, x2 the two halves of the last dimension
    """
    cos_T1K, sin_T1K = angles
    first, second = x_BTNK.float().chunk(2, dim=-1)
    rotated = x_BTNK.float() * cos_T1K + torch.cat([-second, first], dim=-1) * sin_T1K
    return rotated.to(x_BTNK.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product (arXiv 2002.05202): silu(gate) * up."""
    return F.silu(gate) * up


MOST_KINDS_OF_INPUT = 64
"""Shapes, dtypes and modes for which one function is compiled."""

EAGER = Elementwise(rotate, gated)


def compiles(compile_setting: str, activation_checkpointing: str, device_type: str) -> bool:
    """Return whether the functions of a model on `device_type` are compiled, by `training.compile`.

    Under `selective` checkpointing they stay eager: it finds the outputs that it saves by intercepting each operation, and
    torch compiles nothing that is intercepted.
    """
    return compile_setting == "auto" and device_type == "cuda" and activation_checkpointing != "selective"


def elementwise_for(compile_setting: str, activation_checkpointing: str, device_type: str) -> Elementwise:
    """Return the functions that a model on `device_type` runs."""
    if not compiles(compile_setting, activation_checkpointing, device_type):
        return EAGER
    return Elementwise(CompiledIfPossible(rotate), CompiledIfPossible(gated))


class CompiledIfPossible:
    """A function that is compiled at its first call, and runs eagerly, with a warning, if this machine cannot compile it.

    A missing C compiler is the usual reason.
    """

    def __init__(self, function: Callable[..., Tensor], **options: Any):
        import torch._dynamo.config as dynamo  # Takes a second, which only those pay who compile.

        # Queries and keys of two models, trained, validated and frozen: more kinds of input than the eight after which torch
        # would run all further ones uncompiled.
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_KINDS_OF_INPUT)
        self.function = function
        self.compiled: Callable[..., Tensor] = torch.compile(function, dynamic=False, **options)

    def __call__(self, *inputs: Any) -> Tensor:
        try:
            return self.compiled(*inputs)
        except Exception as error:
            # Importing this takes a second, unless a compilation was tried, as it was here.
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            warnings.warn(f"{self.function.__name__} runs uncompiled, and slower: {reason}", stacklevel=2)
            self.compiled = self.function
            return self.function(*inputs)
