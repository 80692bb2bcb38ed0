"""An engine that stands in for DeepSpeed's, with the attributes of its stage 1, and checkpoints of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import CheckpointSettings
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.checkpoint.fragments import fragments_of, optimizer_step
from pipeline.runtime.distributed import World

IDENTITY = {
    "data.global_batch": 8,
    "data.lanes": 8,
    "data.micro_batch": 4,
    "training.k_percent": 0.6,
    "training.selection_pool": "global",
    "logging.metrics_every": 1,
    "training.check_ranks_every": 9,
    "reference.horizon": "shifted",
    "data": "abc",
}


class StandIn:
    """A model of two matrices and a bias whose values are counted from `first`, cut over the ranks as stage 1 cuts it."""

    def __init__(self, first: float = 0.0, step: int = 0):
        self.module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(5, 2, bias=False)})
        parameters = list(self.module.parameters())
        rank, size = dist.get_rank(), dist.get_world_size()
        num_values = sum(parameter.numel() for parameter in parameters)
        share = -(-num_values // size)
        whole = torch.zeros(share * size)
        whole[:num_values] = first + torch.arange(num_values)
        offset = 0
        for parameter in parameters:
            parameter.data = whole[offset : offset + parameter.numel()].view(parameter.shape)
            offset += parameter.numel()
        flat = whole[rank * share : (rank + 1) * share].clone().requires_grad_()
        state = {"step": torch.tensor(float(step)), "exp_avg": flat.detach() + 0.25, "exp_avg_sq": flat.detach() + 0.5}
        self.optimizer = SimpleNamespace(
            bit16_groups=[parameters],
            bit16_groups_flat=[whole],
            single_partition_of_fp32_groups=[flat],
            real_dp_process_group=[dist.group.WORLD],
            optimizer=SimpleNamespace(state={flat: state}),
            update_lp_params=lambda: None,
        )

    @property
    def values(self) -> dict[str, list[float]]:
        """All that this rank's fragments hold."""
        found = {
            f"{each.name} {each.start} {kind}": each.tensors[kind].tolist()
            for each in fragments_of(self)
            for kind in each.tensors
        }
        return found | {"step": [optimizer_step(self)]}


def checkpoints(
    run_dir: Path, identity: dict[str, Any] = IDENTITY, said: list[str] | None = None, **settings: Any
) -> Checkpoints:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    said = [] if said is None else said
    return Checkpoints(run_dir, World(rank, size, rank, size), identity, CheckpointSettings(**settings), say=said.append)


def go_on_to_the_end(store: Checkpoints) -> None:
    while store._writer.is_busy:
        store.go_on()
