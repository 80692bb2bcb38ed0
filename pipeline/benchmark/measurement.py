"""How to measure: processes of their own, ways that take turns, and what collectives really move."""

import multiprocessing
import os
import pickle
import socket
import stat
import statistics
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """[function(*arguments) on rank 0, on rank 1, ...], each a gloo process of its own with one thread.

    The function must live at the top of a module. A rank that raises fails the call with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        answers: Queue[Any] = context.Queue()
        processes = [
            context.Process(target=_run, args=(function, rank, world_size, directory, arguments, answers))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results: dict[int, Any] = {}
            for _ in processes:
                rank, result, error = answers.get(timeout=timeout)
                assert error is None, f"rank {rank} failed:\n{error}"
                results[rank] = pickle.loads(result)
        finally:
            for process in processes:
                process.join(timeout=30)
                process.kill()
        return [results[rank] for rank in range(world_size)]


def _run(
    function: Callable[..., Any], rank: int, world_size: int, directory: str, arguments: tuple[Any, ...], answers: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
        # As bytes: a tensor put as it is would live in shared memory that ends with this process.
        answers.put((rank, pickle.dumps(function(*arguments)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def in_turn(ways: Mapping[str, Callable[[], Any]], runs: int, before: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each run of each way, after one of each that does not count; `before` precedes each, uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            before()
            started = time.perf_counter()
            way()
            if run > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """For each run the seconds of the rank that took longest: no step ends before it."""
    return [max(seconds) for seconds in zip(*of_ranks, strict=True)]


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median of the runs' ratios, so that each compares what was measured side by side."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


class Collective(NamedTuple):
    """kind: `all_gather` or `all_reduce`; payload: bytes that a rank hands in."""

    kind: str
    payload: int

    def wire_bytes(self, ranks: int) -> float:
        """Bytes that each rank sends (and receives): (R-1) n of a gather, 2 (R-1)/R n of a sum, whether round a ring or by
        recursive doubling and halving; no algorithm does with less (Chan et al. 2007, doi 10.1002/cpe.1206)."""
        whole = (ranks - 1) * self.payload
        return whole if self.kind == "all_gather" else 2 * whole / ranks


KINDS = {"_allgather_base_": "all_gather", "allgather_": "all_gather", "allreduce_": "all_reduce"}


class CollectiveRecorder(TorchDispatchMode):
    """While it is entered, notes every collective that this thread calls, whoever calls it and by whatever name."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._opname
            given = args[1] if name.startswith("_allgather") else args[0]
            tensors = given if isinstance(given, list) else [given]
            payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives.append(Collective(KINDS.get(name, name), payload))
        return function(*args, **(kwargs or {}))


def bytes_sent() -> int | None:
    """What this process's open TCP sockets have sent and seen acknowledged, by the kernel's count, gloo's control messages
    included; None elsewhere than on Linux. Waits until no more is acknowledged."""
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
