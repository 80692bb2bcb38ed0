"""A record of the collectives that are called, and the kernel's count of the bytes that they send over sockets."""

import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One collective: its kind (`all_gather`, `all_reduce`, `reduce_scatter`) and payload, the bytes that a rank hands in."""

    kind: str
    payload: int

    def wire_bytes(self, ranks: int) -> float:
        """Return the bytes that each rank sends (and receives): (R-1) n of a gather, (R-1)/R n of a scattered sum, 2 (R-1)/R n
        of a sum that all receive.

        Both a ring and recursive doubling and halving send as much; no algorithm does with less (Chan et al. 2007, doi
        10.1002/cpe.1206).
        """
        whole = (ranks - 1) * self.payload
        return {"all_gather": whole, "reduce_scatter": whole / ranks}.get(self.kind, 2 * whole / ranks)


KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
}


class CollectiveRecorder(TorchDispatchMode):
    """A list of every collective that this thread calls while the recorder is entered, by whatever name it is called.

    ranks: of each one's process group, as many as it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.ranks: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._opname
            # The output comes first where it is not the input.
            given = args[1] if name.startswith(("_allgather", "allgather", "_reduce_scatter", "reduce_scatter")) else args[0]
            tensors = given if isinstance(given, list) else [given]
            tensors = [tensor for each in tensors for tensor in (each if isinstance(each, list) else [each])]
            payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives.append(Collective(KINDS.get(name, name), payload))
            self.ranks.append(_group_size(args))
        return function(*args, **(kwargs or {}))


def _group_size(arguments: Sequence[Any]) -> int:
    """Return the number of ranks of the process group among a collective's arguments."""
    objects = (each for each in arguments if isinstance(each, torch.ScriptObject))
    group = next(each for each in objects if each._type().qualified_name().endswith(".ProcessGroup"))
    return dist.ProcessGroup.unbox(group).size()


def bytes_sent() -> int | None:
    """Return the bytes that this process's open TCP sockets have sent and seen acknowledged; None elsewhere than on Linux.

    The kernel counts them, gloo's control messages included. Waits until no more is acknowledged.
    """
    if not os.path.isdir("/proc/self/fd"):
        return None
    before, now = -1, 0
    while now != before:
        time.sleep(0.05)
        before, now = now, sum(_acknowledged(int(descriptor)) for descriptor in os.listdir("/proc/self/fd"))
    return now


def _acknowledged(descriptor: int) -> int:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return 0
    except OSError:
        return 0  # The listing's own descriptor, closed by now.
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        # tcpi_bytes_acked of the kernel's struct tcp_info.
        return struct.unpack_from("Q", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128), 120)[0]
