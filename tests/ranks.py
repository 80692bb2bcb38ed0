"""Runs a plain function on several gloo ranks, each a process of its own, and brings back what each returns."""

import gc
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.benchmark import measurement

# Others' modules alone: the package itself each rank imports from where this process has it.
_LOADED_ONCE = [
    "torch.nn.attention.varlen",
    "torch.utils.tensorboard",
    "pydantic",
    "safetensors.torch",
    "tokenizers",
    "webdataset",
    "pytest",
    "hypothesis",
    "setuptools",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300, start_afresh: bool = False
) -> list[Any]:
    """[function(*arguments) on rank 0, on rank 1, ...], as `measurement.run_ranks` has it.

    Ranks are forked from one process that has loaded torch and DeepSpeed, for which each would take 7 s of a core. So they have
    the environment that was when the first ranks were started; start_afresh: that of now, in processes that load everything
    themselves. Beside a GPU all do: what has seen one cannot be forked.
    """
    if start_afresh or sys.platform != "linux" or torch.cuda.is_available():
        return measurement.run_ranks(function, world_size, *arguments, timeout=timeout)
    multiprocessing.set_forkserver_preload(_LOADED_ONCE)
    forking, asked = multiprocessing.get_context("forkserver"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: asked.append(method) or forking)
        results = measurement.run_ranks(_forked, world_size, function, *arguments, timeout=timeout)
    assert asked == ["spawn"], "these ranks were started in another way"
    return results


def _forked(function: Callable[..., Any], *arguments: Any) -> Any:
    gc.freeze()  # DeepSpeed collects garbage with every engine: of what was loaded there is none, and looking takes a second.
    return function(*arguments)
