"""Processes of their own without the seven seconds of a core that each needs to load torch and DeepSpeed: forked from one
process that has loaded them, and nothing of this package.

Such a process differs from one that is started afresh in what is loaded, and in having the environment that its ancestor
had when libraries were. Beside a GPU there are none: what has seen one cannot be forked.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()
# The package itself each process imports from where its parent has it.
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


def forking() -> Any:
    """The context of multiprocessing whose processes are forked so."""
    multiprocessing.set_forkserver_preload(_LOADED_ONCE)
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def forked_where_spawned() -> Iterator[None]:
    """Have what asks multiprocessing for processes that are spawned get forked ones."""
    context, asked = forking(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: asked.append(method) or context)
        yield
    assert "spawn" in asked, "these processes were started in another way"


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a forked process. DeepSpeed collects garbage with every engine; the objects that were loaded before
    hold none, and are left out, because searching them takes a second."""
    gc.freeze()
    return function(*arguments)


def run_script(
    script: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 900,
    start_afresh: bool = False,
    with_its_processes: bool = False,
) -> subprocess.CompletedProcess[str]:
    """A script of launch/ on its command line. with_its_processes: those that it would spawn are forked as well."""
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)]
    environment = dict(os.environ if environment is None else environment)
    if start_afresh or not CAN_FORK:
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory() as directory:
        streams = [Path(directory) / name for name in ("out", "err")]
        given = (command[1:], environment, cwd, streams, with_its_processes)
        process = forking().Process(target=call, args=(as_main, *given))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(stream.read_text() for stream in streams))


def as_main(command: list[str], environment: dict[str, str], cwd: Path, streams: list[Path], with_its_processes: bool) -> None:
    for stream, descriptor in zip(streams, (1, 2), strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    with forked_where_spawned() if with_its_processes else contextlib.nullcontext():
        runpy.run_path(command[0], run_name="__main__")
