"""Rank, world size and device of this process, and the small collectives by which ranks agree.

Ranks come from the launcher's environment variables (`deepspeed`, torchrun) or, under srun, from Slurm's; without either the
job is a single process. Every rank runs every collective here whatever its data, because one that does not hangs the job.
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

SECONDS_TO_APPEAR = 120.0
"""Time in which a shared file system has to show a new file to all machines."""

_LONGEST_MAKING = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """Position of this process in the job: rank in [0, size), local_rank in [0, local_size) on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def find_world() -> World:
    """Read the rank from the environment, and set the variables that torch.distributed expects where they are missing."""
    # Under srun: Slurm's own variables, one task per rank.
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        # Of this step: an interactive shell on a node has the tasks of its whole allocation in SLURM_NTASKS.
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env["LOCAL_WORLD_SIZE"] = _tasks_on_this_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"]))

    # Without a launcher: one process. A free port lets several such jobs share a machine.
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if int(env["WORLD_SIZE"]) == 1:
        env.setdefault("MASTER_PORT", str(_free_port()))

    local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), int(local_size))


class UnknownAddressError(ValueError):
    """MASTER_ADDR is a name that this machine cannot look up."""


def look_up_meeting_point() -> None:
    """See that the address at which the ranks meet can be looked up: torch would try again for minutes, in silence.

    Raises:
        UnknownAddressError: it cannot.
    """
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UnknownAddressError(
            f"MASTER_ADDR is {address}, and {socket.gethostname()} cannot look that name up ({error}); have machines' names "
            "resolve (DNS, /etc/hosts), or set MASTER_ADDR to an address"
        ) from error


def device_of(world: World) -> torch.device:
    """This rank's CUDA device, made the current one; the CPU where there is none.

    Where each task sees GPUs of its own (Slurm's --gpus-per-task, --gpu-bind) they count from 0 in each. LOCAL_RANK is set to
    the device's index, because DeepSpeed takes it for that.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = world.local_rank % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def missing_devices(drivers: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """A sentence where this machine has GPUs, nobody has hidden them, and torch sees none; else None."""
    if torch.cuda.is_available() or not drivers.is_dir() or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return None
    reason = "the driver is too old for this torch, or the job was given no GPU"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA; install a build that has it"
    return (
        f"this machine has {len(list(drivers.iterdir()))} GPU(s), and torch sees none ({reason}): training on the CPU's cores"
    )


def share_cores(world: World) -> None:
    """Set torch's thread count to OMP_NUM_THREADS where that is set (as `torchrun` does for several ranks), else to this rank's
    share of the machine's cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    is_asked = asked.isdigit() and int(asked) > 0
    torch.set_num_threads(int(asked) if is_asked else cores_of_rank(world, len(os.sched_getaffinity(0))))


def cores_of_rank(world: World, allowed: int) -> int:
    """Cores of this rank, at least 1: its share of the smaller of what its process may run on and what Slurm gives its task.

    A task's ranks share its cores: one if srun starts the ranks, several if `torchrun` does so in each task. Slurm need not
    bind a task to its cores, and srun may bind it to fewer than the job asked for.
    allowed: cores in this process's affinity.
    """
    env = os.environ
    on_node, per_task = (int(env.get(name, 0)) for name in ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK"))
    if "SLURM_STEP_TASKS_PER_NODE" not in env or "SLURM_NODEID" not in env:
        return max(1, min(allowed, on_node or allowed) // world.local_size)
    tasks = int(_tasks_on_this_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"])))
    given = per_task or on_node // tasks or allowed
    return max(1, min(allowed, given) // max(1, world.local_size // tasks))


def make_once(path: Path, make: Callable[[], None], world: World, again: bool = False) -> None:
    """Run `make` on the first rank unless `path` exists (always with `again`), while the other ranks wait. Collective.

    An exception of `make` is raised on every rank; if the first rank dies, the wait of the others ends with an error. `make`
    must create `path` by a rename, so that its existence means that it is complete.

    Raises:
        OSError: this machine does not see what the first rank has made.
    """
    # The default group's collectives time out in minutes, hence a group with its own timeout. It is created before the work
    # begins: a waiting rank notices the first rank's death only over an open connection.
    waiting = dist.new_group(backend="gloo", timeout=_LONGEST_MAKING)

    failure: Exception | None = None
    if world.is_first and (again or not path.exists()):
        try:
            make()
        except Exception as error:
            failure = error
    failure = broadcast_from_first(failure, waiting)
    if failure is not None:
        raise failure

    # A shared file system may show the path to other machines a little later.
    ends = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > ends:
            raise OSError(
                f"{path}: the first rank has made it, but {socket.gethostname()} does not see it in {SECONDS_TO_APPEAR:g} s; "
                "the folder must be on a file system that all machines share"
            )
        time.sleep(0.2)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Logical or of `flag` over ranks; one all-reduce, and the host waits for the device."""
    return max_over_ranks(flag, device) > 0


def max_over_ranks(value: float, device: torch.device) -> float:
    """Maximum of `value` over ranks; one float64 all-reduce, and the host waits for the device."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def min_over_ranks(value: float, device: torch.device) -> float:
    """Minimum of `value` over ranks; one float64 all-reduce, and the host waits for the device."""
    return -max_over_ranks(-value, device)


def broadcast_from_first(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Broadcast the first rank's `value` (any object) to every rank; `value` itself where there is no process group."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def gather_over_ranks(value: Any) -> list[Any]:
    """Gather every rank's `value` (any object), in the order of ranks; only this one where there is no process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ranks_of_each_node(world: World) -> int:
    """The number of ranks of every node; 1 where nodes have unlike numbers. Collective."""
    numbers = set(gather_over_ranks(world.local_size))
    return numbers.pop() if len(numbers) == 1 else 1


def _tasks_on_this_node(tasks_per_node: str, node: int) -> str:
    """Parse SLURM_STEP_TASKS_PER_NODE: '2(x3),1' means two tasks on each of three nodes, then one."""
    counts: list[str] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[node]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
