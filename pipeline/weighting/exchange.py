"""How the ranks see one another's excess keys: one fixed-shape all-gather a micro-step, for all heads together."""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it and deprecates the name that 2.11 knows.
_gather_into_one = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup | None
"""The processes of a pool; None is this process alone."""


def all_gather(keys: Tensor, group: Group) -> Tensor:
    """[R, *keys.shape], the tensors of all ranks in rank order; shapes must be equal on all."""
    if group is None:
        return keys[None]
    gathered = torch.empty((dist.get_world_size(group), *keys.shape), dtype=keys.dtype, device=keys.device)
    _gather_into_one(gathered.view(-1), keys.contiguous().view(-1), group=group)
    return gathered


def all_reduce_sum(values: Tensor, group: Group) -> Tensor:
    """The sum over all ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values
