"""Who this process is among the others, and the few things all of them do together.

Ranks come from the launcher's variables (`deepspeed`, torchrun) or, under srun, from Slurm's; without either this is a
job of one process. Collectives used for agreement are tiny and run by every rank whatever its data.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """rank in [0, size); local_rank in [0, local_size) on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def find_world() -> World:
    """Read the launcher's variables, and set those that torch.distributed expects where they are missing."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env["LOCAL_WORLD_SIZE"] = _tasks_on_this_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"]))
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if int(env["WORLD_SIZE"]) == 1:
        env.setdefault("MASTER_PORT", str(_free_port()))
    local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), int(local_size))


def device_of(world: World) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    return torch.device("cpu")


def share_cores(world: World) -> None:
    """Give this rank its part of the machine's cores as threads: more would fight, fewer would idle."""
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", 0)) or len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // world.local_size))


def make_once(path: Path, make: Callable[[], None], world: World, again: bool = False) -> None:
    """Have the first rank run `make` unless `path` exists (or `again`); the others wait for it however long it takes.

    What `make` raises is raised on every rank; if the first rank dies, the others' wait ends with an error. `make` must
    create `path` by a rename, so that its existence means that it is complete.
    """
    # A group of its own, because its patience is its own too: others' collectives time out in minutes. It exists before the
    # work begins, so that the others are connected to the first rank and feel it die.
    waiting = dist.new_group(backend="gloo", timeout=timedelta(weeks=1))
    failure: Exception | None = None
    if world.is_first and (again or not path.exists()):
        try:
            make()
        except Exception as error:
            failure = error
    failure = broadcast_from_first(failure, waiting)
    if failure is not None:
        raise failure
    while not path.exists():  # A shared file system may show it to other machines a little later.
        time.sleep(0.2)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; one collective, which waits for the device."""
    return max_over_ranks(flag, device) > 0


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' values; one collective, which waits for the device."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def min_over_ranks(value: float, device: torch.device) -> float:
    """The smallest of the ranks' values; one collective, which waits for the device."""
    return -max_over_ranks(-value, device)


def broadcast_from_first(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The first rank's `value`, on every rank; one collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def _tasks_on_this_node(tasks_per_node: str, node: int) -> str:
    """Slurm's '2(x3),1' means two tasks on each of three nodes, then one."""
    counts: list[str] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[node]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
