"""Runs a plain function on several gloo ranks, each a process of its own, and brings back what each returns."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """[function(*arguments) on rank 0, on rank 1, ...]; `function` finds the process group initialised.

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
    try:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
        # As bytes: a tensor put as it is would live in shared memory that ends with this process.
        answers.put((rank, pickle.dumps(function(*arguments)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
