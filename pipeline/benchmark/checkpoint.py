"""Saving and loading a checkpoint, beside DeepSpeed's `save_checkpoint` and torch's `distributed.checkpoint.async_save`.

    synchronous   write, hash, sync to the disk and commit while training waits
    background    the same behind training: for how long it waits, and what the steps beside it take
    load          verify every byte and load
    deepspeed     its own files of the same engine: neither hashed nor synced
    torch         the same tensors by `async_save`, neither hashed nor synced: the caller's wait, and until all is written

One rank, in turn, round by round; the same bytes but for headers.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pipeline.benchmark import step
from pipeline.benchmark.stepping import TrainingSteps
from pipeline.benchmark.streaming import random_rows
from pipeline.config import CheckpointSettings
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.checkpoint.fragments import fragments_of
from pipeline.runtime.checkpoint.state import HeldOut

WARM_UP_ROUNDS = 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and bytes, of each way; medians over the rounds."""
    step.check_shape(options)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        rounds = WARM_UP_ROUNDS + options.rounds
        rows = options.rows * _STEPS_A_ROUND * (rounds + 1)
        directory = random_rows(Path(scratch), rows, options.sequence_length, options.vocabulary)
        run = step.build("mtp", directory, vars(options))
        ways = _Ways(run, Path(scratch) / "checkpoints")
        measured = [ways.round() for _ in range(rounds)][WARM_UP_ROUNDS:]
    dist.destroy_process_group()
    medians = {key: statistics.median(of_round[key] for of_round in measured) for key in measured[0]}
    stall = statistics.median(of_round["background_waited"] / of_round["synchronous"] for of_round in measured)
    return medians | {"stall_of_synchronous": stall, "torch": torch.__version__}


def table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['bytes'] / 1e6:,.0f} MB a checkpoint; one rank; seconds, medians; torch {figures['torch']}"]
    for name, keys in _LINES.items():
        lines.append(f"  {name:42}" + "".join(f"{figures[key]:>9.3f}" for key in keys))
    lines.append(f"training waits {figures['stall_of_synchronous']:.1%} of a synchronous save for one in the background")
    return "\n".join(lines)


_STEPS_A_ROUND = 12
_LINES = {
    "synchronous save": ["synchronous"],
    "in the background: waited, until committed": ["background_waited", "background_total"],
    "a step, a step beside it": ["step", "step_beside"],
    "load, verified": ["load"],
    "DeepSpeed's save_checkpoint": ["deepspeed"],
    "torch's async_save: waited, until written": ["dcp_waited", "dcp_total"],
}


class _Ways:
    """The ways to save one engine, each of which measures itself."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run, self.directory = run, directory
        self.take_step = TrainingSteps(run)
        self.said: list[str] = []
        self.checkpoints = Checkpoints(directory, run.world, {}, CheckpointSettings(keep=1), say=self.said.append)
        self.number = 0
        # torch's async_save wants a group of the host's, also beside one of the devices'.
        self.group = dist.new_group(backend="gloo")

    def round(self) -> dict[str, float]:
        """Every way once."""
        found = {"step": _seconds(self.take_step)}
        found |= {"synchronous": _seconds(lambda: self._save(in_background=False))}
        found |= self._in_background()
        found["load"] = _seconds(lambda: self.checkpoints.resume(self.run.engine, allow_changed=False))
        newest = self.directory / "checkpoints" / f"step-{self.number:08d}"
        found["bytes"] = float(sum(path.stat().st_size for path in newest.iterdir()))
        return found | self._others()

    def _save(self, *, in_background: bool) -> None:
        self.number += 1
        self.checkpoints.save(self.run.engine, Progress(step=self.number), HeldOut(), in_background=in_background)

    def _in_background(self) -> dict[str, float]:
        started = time.perf_counter()
        waited = _seconds(lambda: self._save(in_background=True))
        beside: list[float] = []
        for _ in range(2):  # Until the files are written, and until the checkpoint is committed.
            while not self.checkpoints.is_written and len(beside) < _STEPS_A_ROUND - 2:
                beside.append(_seconds(self.take_step))
            waited += _seconds(self.checkpoints.go_on)
        return {
            "background_waited": waited,
            "background_total": time.perf_counter() - started,
            "step_beside": statistics.median(beside or [0.0]),
        }

    def _others(self) -> dict[str, float]:
        engine, folder = self.run.engine, self.directory / "others"
        deepspeed = _seconds(lambda: engine.save_checkpoint(str(folder / "deepspeed"), tag="tag", save_latest=False))

        tensors = {f"{each.name}|{kind}": value for each in fragments_of(engine) for kind, value in each.tensors.items()}
        started = time.perf_counter()
        future: Any = dcp.async_save(tensors, checkpoint_id=folder / "torch", process_group=self.group)
        waited = time.perf_counter() - started
        future.result()
        total = time.perf_counter() - started
        shutil.rmtree(folder)
        return {"deepspeed": deepspeed, "dcp_waited": waited, "dcp_total": total}


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
