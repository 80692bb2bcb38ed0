"""Runs a plain function on several gloo ranks, each a process of its own, and brings back what each returns."""

from collections.abc import Callable
from typing import Any

from pipeline.benchmark import ranks
from tests.forked import CAN_FORK, call, forked_where_spawned


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 900, start_afresh: bool = False
) -> list[Any]:
    """[function(*arguments) on rank 0, on rank 1, ...], as `ranks.run_ranks` has it, of processes that are forked; or
    started afresh, with the environment of now."""
    if start_afresh or not CAN_FORK:
        return ranks.run_ranks(function, world_size, *arguments, timeout=timeout)
    with forked_where_spawned():
        return ranks.run_ranks(call, world_size, function, *arguments, timeout=timeout)
