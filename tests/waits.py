"""Counting, on a CPU, the operations for which a host would wait for its device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
WAITING = {
    _aten._local_scalar_dense.default,  # item, tolist of one, a condition
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten._unique2.default,
    _aten.repeat_interleave.Tensor,
    _aten.equal.default,
}


class CountWaits(TorchDispatchMode):
    """How often the host asked for what only the device knows. A tensor's `tolist` is one wait: its values come together,
    but on a CPU they show as nothing at all, so they are counted where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self._tolist = torch.Tensor.tolist

    def __enter__(self) -> "CountWaits":
        def tolist(tensor: torch.Tensor) -> Any:
            self.number += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An index that is a mask becomes the places where it is set.
        masks = func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.number += func in WAITING or masks
        return func(*args, **(kwargs or {}))
