"""The exact top of a pool that ranks share, found by two exchanges that agree bit for bit.

`all_gather` gives every rank all keys: one collective, 4 bytes a pair, growing with the ranks and their tokens.
`radix` never moves a pair: three all-reduced histograms (of 11, 11 and 10 bits of the keys, all heads at once) narrow
the threshold down to its last bit, and one all-reduced table of tie counts assigns the ties to ranks. Its traffic grows
with the number of heads and, in the ties, of ranks, not with tokens. Both run the same collectives in the same order
on every rank whatever its data, and neither waits for the device. `pipeline.benchmark.selection` measures them.

Shapes: R ranks, M micro-steps of the pool, B rows, T tokens, K heads that select.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.weighting.selection import NON_FINITE_KEY, excess_of_key, select_top

# torch 2.13 renamed it and deprecates the name that 2.11 knows.
_gather_into_one = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup | None
"""The processes of a pool; None is this process alone."""

Exchange = Callable[[Tensor, Sequence[int], Group], tuple[Tensor, Tensor, Tensor]]
"""(keys_MBTK int32, m for each head over the whole pool, group) -> (selected_MBTK bool, this rank's part;
threshold_K float32, NaN where m is 0; finite bool scalar, over all ranks)."""

DIGITS = ((21, 2**11), (10, 2**11), (0, 2**10))
"""(lowest bit, number of values) of the parts in which `radix` takes a key, highest first."""

GATHER_AT_MOST = 2**20
"""Bytes of a pool's keys that `auto` still gathers. From `launch/benchmark.py selection`, 2 to 8 gloo ranks on a CPU: radix
takes 1.3 to 5 times as long as gathering at up to 0.75 MiB, as long at 1.5 MiB, 0.6 of it at 3 MiB and a quarter at 6 to 24
MiB. On a network of 5 us a message and 50 GB/s a GPU that benchmark's model has them cross at 4 to 14 MiB, below which radix
is slower by 0.3 ms at most."""


def all_gather(values: Tensor, group: Group) -> Tensor:
    """Gather the tensors of all ranks in rank order, [R, *values.shape]; shapes must be equal on all."""
    if group is None:
        return values[None]
    gathered = torch.empty((dist.get_world_size(group), *values.shape), dtype=values.dtype, device=values.device)
    _gather_into_one(gathered.view(-1), values.contiguous().view(-1), group=group)
    return gathered


def all_reduce_sum(values: Tensor, group: Group) -> Tensor:
    """Sum over all ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def ranks_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def on_device(numbers: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers from the host to a tensor without waiting for the device, by way of pinned memory; cast what is there."""
    if isinstance(numbers, Tensor) and numbers.device == device:
        return numbers.to(dtype)
    values = torch.as_tensor(numbers, dtype=dtype)
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class HostCopy:
    """A copy of a device's values to the host that runs behind the device's other work."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> list[Any]:
        """Return the values; waits if they have not arrived yet, but not for work that the device was given after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        # By way of numpy, which refuses what lies on a device.
        found: list[Any] = self._values.numpy().tolist()
        return found


def suited_exchange(num_keys: int, ranks: int) -> str:
    """Name the exchange that `auto` takes for `num_keys` keys a rank; all ranks have equally many, so all choose alike."""
    return "all_gather" if 4 * num_keys * ranks <= GATHER_AT_MOST else "radix"


def exchange_named(name: str, num_keys: int, group: Group) -> Exchange:
    """Return the exchange `all_gather` or `radix`, or by `auto` the one that suits `num_keys` keys a rank."""
    if name == "auto":
        name = suited_exchange(num_keys, ranks_of(group))
    return {"all_gather": select_by_gathering, "radix": select_by_radix}[name]


def select_by_gathering(keys_MBTK: Tensor, num_selected_K: Sequence[int], group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Select by the exchange `all_gather`."""
    keys_MRBTK = all_gather(keys_MBTK, group).transpose(0, 1)
    selected, thresholds = [], []
    for head, count in enumerate(num_selected_K):
        keys_MRBT = keys_MRBTK[..., head]
        selected_P, threshold = select_top(keys_MRBT.reshape(-1), count)
        selected.append(selected_P.view(keys_MRBT.shape)[:, rank_in(group)])
        thresholds.append(threshold)
    return torch.stack(selected, dim=-1), torch.stack(thresholds), (keys_MRBTK != NON_FINITE_KEY).all()


def select_by_radix(keys_MBTK: Tensor, num_selected_K: Sequence[int] | Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Select by the exchange `radix`: the threshold's key digit by digit, highest first, then the ties.

    `num_selected_K` may lie on the device: it is not waited for."""
    num_heads = keys_MBTK.shape[-1]
    keys_KP = keys_MBTK.movedim(-1, 0).reshape(num_heads, -1)
    count_K = on_device(num_selected_K, torch.int64, keys_KP.device)
    counts_dtype = histogram_dtype(keys_KP.shape[1] * ranks_of(group))
    candidate_KP = keys_KP > NON_FINITE_KEY
    threshold_key_K = torch.zeros_like(count_K)
    still_needed_K = count_K

    # Each digit of the threshold's key, from a histogram over all ranks of the keys that begin as it does.
    for lowest_bit, num_values in DIGITS:
        # The highest digit carries the sign: shifted up by half its range it orders as the keys do.
        digit_KP = (keys_KP >> lowest_bit) + 2**10 if lowest_bit == 21 else (keys_KP >> lowest_bit) & (num_values - 1)
        histogram_KV = torch.zeros(num_heads, num_values, dtype=counts_dtype, device=keys_KP.device)
        histogram_KV.scatter_add_(1, digit_KP.long(), candidate_KP.to(counts_dtype))
        if lowest_bit == 21:
            # No number's key has the lowest digit of all (it would begin a NaN): there is room to count those that are none.
            histogram_KV[:, 0] = (keys_KP == NON_FINITE_KEY).sum(1)
            finite = (all_reduce_sum(histogram_KV, group)[:, 0] == 0).all()
        else:
            all_reduce_sum(histogram_KV, group)
        digit_K, still_needed_K = _digit_of_threshold(histogram_KV, still_needed_K)
        candidate_KP &= digit_KP == digit_K[:, None]
        threshold_key_K += (digit_K - 2**10 if lowest_bit == 21 else digit_K) * 2**lowest_bit

    # The candidates left are the pairs equal to the threshold; `still_needed_K` of them are taken, in order.
    tied_KMN = candidate_KP.view(num_heads, keys_MBTK.shape[0], -1)
    # Each rank fills its own row. Gathered, the table would go round a ring of all ranks; a sum goes up and down a tree.
    tied_RKM = torch.zeros(ranks_of(group), *tied_KMN.shape[:2], dtype=counts_dtype, device=keys_KP.device)
    tied_RKM[rank_in(group)] = tied_KMN.sum(-1)
    all_reduce_sum(tied_RKM, group)
    before_MK = _ties_before(tied_RKM, rank_in(group))
    position_KMN = before_MK.T[..., None] + tied_KMN.cumsum(-1)
    chosen_KMN = tied_KMN & (position_KMN <= still_needed_K[:, None, None])

    # Selected: all above the threshold, and those ties.
    above_KP = (keys_KP > threshold_key_K[:, None]) & (count_K > 0)[:, None]
    selected_KP = above_KP | (chosen_KMN.flatten(1) & (count_K > 0)[:, None])
    selected_MBTK = selected_KP.view(num_heads, *keys_MBTK.shape[:-1]).movedim(0, -1)
    return selected_MBTK, torch.where(count_K > 0, excess_of_key(threshold_key_K.int()), math.nan), finite


def histogram_dtype(num_pairs: int) -> torch.dtype:
    """Return the smallest integer type that counts `num_pairs` pairs of a pool."""
    return torch.int32 if num_pairs < 2**31 else torch.int64


def _digit_of_threshold(histogram_KV: Tensor, needed_K: Tensor) -> tuple[Tensor, Tensor]:
    """Find the digit of the needed-th largest candidate, and how many candidates with that digit are needed; int64."""
    at_least_KV = histogram_KV.long().flip(1).cumsum(1).flip(1)
    digit_K = (at_least_KV >= needed_K[:, None]).sum(1).clamp(min=1) - 1
    above_K = torch.nn.functional.pad(at_least_KV, (0, 1)).gather(1, digit_K[:, None] + 1)[:, 0]
    return digit_K, needed_K - above_K


def _ties_before(tied_RKM: Tensor, rank: int) -> Tensor:
    """Count the ties that come before this rank's in each micro-step, [M, K], in the order (micro-step, rank)."""
    num_ranks, num_heads, num_micro_steps = tied_RKM.shape
    counts_CK = tied_RKM.permute(2, 0, 1).reshape(-1, num_heads)
    before_CK = counts_CK.cumsum(0) - counts_CK
    return before_CK.view(num_micro_steps, num_ranks, num_heads)[:, rank]
