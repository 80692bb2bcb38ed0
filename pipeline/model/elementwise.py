"""The functions between a block's matrix products, RoPE and SwiGLU's product, compiled where that pays.

Eagerly each is a handful of passes over the block's widest tensors. On an H200 (torch 2.11, D 2048, 16k tokens, bf16) a block's
forward and backward took 11.8 ms with 5.0 ms of products at the card's peak; compiled, RoPE read and written once, 9.5 ms and a
tenth less memory. Only these leaf functions are compiled: ZeRO-3 gathers weights in hooks of modules, which stay as they are. A
CPU gains nothing, and neither does RMSNorm, which is one kernel already.
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
    """rotate: (x [B, T, N, K], angles) -> the same shape. gated: (gate, up) -> silu(gate) * up."""

    rotate: Callable[[Tensor, Angles], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]


def rotate(x_BTNK: Tensor, angles: Angles) -> Tensor:
    """RoPE in the half-rotation layout (arXiv 2104.09864), in float32, rounded once.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)
    """
    cos_T1K, sin_T1K = angles
    first, second = x_BTNK.float().chunk(2, dim=-1)
    rotated = x_BTNK.float() * cos_T1K + torch.cat([-second, first], dim=-1) * sin_T1K
    return rotated.to(x_BTNK.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product (arXiv 2002.05202)."""
    return F.silu(gate) * up


MOST_KINDS_OF_INPUT = 64

EAGER = Elementwise(rotate, gated)


def elementwise_for(compile_setting: str, activation_checkpointing: str, device_type: str) -> Elementwise:
    """Those that a model on `device_type` runs, by `training.compile`.

    Under `selective` checkpointing they stay eager: what that keeps it finds by watching each operation, and torch compiles
    nothing that is watched.
    """
    if compile_setting == "off" or device_type != "cuda" or activation_checkpointing == "selective":
        return EAGER
    return Elementwise(CompiledIfPossible(rotate), CompiledIfPossible(gated))


class CompiledIfPossible:
    """A function compiled at its first call; where this machine cannot compile (no C compiler, say), as it is."""

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
            from torch._dynamo.exc import TorchDynamoException  # Takes a second to import, and is there once this was tried.

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            warnings.warn(f"{self.function.__name__} runs uncompiled, and slower: {reason}", stacklevel=2)
            self.compiled = self.function
            return self.function(*inputs)
