"""Count, on a CPU, the operations for which a host would wait for its device; on a GPU, forbid them."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
WAITING = {
    _aten._local_scalar_dense.default,  # item, tolist of one, a condition
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten._unique.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
    _aten.equal.default,
}


_PACKAGE, _DEEPSPEED = f"{Path(__file__).parents[1] / 'pipeline'}/", f"{Path(deepspeed.__file__).parent}/"


class CountWaits(TorchDispatchMode):
    """Where the package asks, FILE:LINE, for what only the device knows; where DeepSpeed does is its own affair. A tensor's
    `tolist` and `cpu` are one wait: on a CPU they show as nothing at all, so they are counted where they are asked for. What
    has come to the host unasked is read by way of `numpy`, which does not wait. device_synchronized: how often anybody had the
    host wait until the device had nothing left to do.

    Not seen: copies to the device from memory that is not pinned, of which a CPU has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.device_synchronized = 0
        self._patches = pytest.MonkeyPatch()

    @property
    def number(self) -> int:
        return len(self.places)

    def __enter__(self) -> "CountWaits":
        def noted(original: Any) -> Any:
            def call(tensor: torch.Tensor) -> Any:
                self._note()
                return original(tensor)

            return call

        def synchronized(*arguments: Any) -> None:
            self.device_synchronized += 1

        for name in ("tolist", "cpu"):
            self._patches.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
        self._patches.setattr(type(get_accelerator()), "synchronize", synchronized)
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._patches.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An index that is a mask becomes the places where it is set.
        masks = func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or masks:
            self._note()
        return func(*args, **(kwargs or {}))

    def _note(self) -> None:
        frame = inspect.currentframe()
        while frame is not None and not frame.f_code.co_filename.startswith((_PACKAGE, _DEEPSPEED)):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            self.places.append(f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno}")


@contextmanager
def waiting_for_cuda_raises() -> Iterator[None]:
    """Have whatever makes the host wait for a CUDA device raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the mode itself: it calls itself a prototype.
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
