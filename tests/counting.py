"""Counts, by phase, the kernels that a device would be given and the bytes that they read and write.

It sees what is dispatched, on real tensors or on fake ones that hold nothing (`tests.gpu.rehearsal`). A phase is the innermost
`record_function` around an operation.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNELS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::_unsafe_view")
"""Operations that reserve memory without writing into it, or are views that do not say so."""
GATHERS = ("aten::index", "aten::index_select", "aten::gather", "aten::embedding", "aten::take")
"""Operations that read of their first argument only as much as they return."""
SCATTERS = ("aten::index_put_", "aten::index_copy_", "aten::scatter_", "aten::scatter_add_", "aten::index_add_")
"""Operations that change of their first argument only as much as their last argument holds."""


class CountLaunches(TorchDispatchMode):
    """launches, bytes: by (phase, name of the operation), the phase `other` outside of any. bytes_on: those of
    operations' outputs, by kind of device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.bytes_on: Counter[str] = Counter()
        self._phases = ["other"]
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name == "profiler::_record_function_enter_new":
            # Optimizers name their own calls CLASS.step#..., which is no phase.
            self._phases.append(self._phases[-1] if "#" in args[0] else args[0])
        elif name == "profiler::_record_function_exit":
            self._phases.pop()
        elif not (self._is_paused or func.is_view or name in NO_KERNELS or name.startswith(("prim::", "profiler::"))):
            self._count(name, _bytes_of(name, args, kwargs, output))
            for tensor in _tensors(output):
                self.bytes_on[tensor.device.type] += _size([tensor])
        return output

    @contextmanager
    def as_one(self, name: str, *read: Tensor) -> Iterator[list[Tensor]]:
        """Count a `with` as one kernel, as a compiled function is, which reads `read` and writes what is put into the list."""
        was_paused, self._is_paused = self._is_paused, True
        written: list[Tensor] = []
        try:
            yield written
        finally:
            self._is_paused = was_paused
            self._count(name, _size([*read, *written]))

    def _count(self, name: str, num_bytes: int) -> None:
        self.launches[self._phases[-1], name] += 1
        self.bytes[self._phases[-1], name] += num_bytes


class Fused:
    """A function of tensors that counts as one kernel, and its gradient as another. It is differentiated by its first inputs,
    up to `num_differentiated`."""

    def __init__(self, function: Callable[..., Tensor], counts: CountLaunches, num_differentiated: int):
        self.function, self.counts, self.num_differentiated = function, counts, num_differentiated

    def __call__(self, *inputs: Any) -> Tensor:
        output: Tensor = _Fused.apply(self, *inputs[: self.num_differentiated], *inputs[self.num_differentiated :])
        return output


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Fused, *inputs: Any) -> Tensor:
        ctx.fused, ctx.inputs = fused, inputs
        with fused.counts.as_one(fused.function.__name__, *_tensors(inputs)) as written:
            written.append(output := fused.function(*inputs))
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        fused, inputs = ctx.fused, ctx.inputs
        leaves = [each.detach().requires_grad_() for each in inputs[: fused.num_differentiated]]
        name = f"{fused.function.__name__} backward"
        with fused.counts.as_one(name, *_tensors(inputs), *upstream) as written, torch.enable_grad():
            output = fused.function(*leaves, *inputs[len(leaves) :])
            written += torch.autograd.grad(output, leaves, upstream)
        return None, *written, *[None] * (len(inputs) - len(leaves))


def _bytes_of(name: str, args: Any, kwargs: Any, output: Any) -> int:
    """Count what an operation reads and writes. What is written into `out` is its output."""
    if name in GATHERS:
        return _size(_tensors(args[1:])) + 2 * _size(_tensors(output))
    if name in SCATTERS:
        return _size(_tensors(args[1:])) + _size(_tensors(args[-1]))
    read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
    return _size(_tensors((args, read, output)))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
