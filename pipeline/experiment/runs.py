"""Run commands of launch/ as processes of their own: each once, each on a core or a GPU of its own.

A run is an ordinary recipe in DIR/recipes, which launch/train.py runs by itself, in DIR/runs/NAME. It is done when its last
checkpoint and its closing records are there, and is never begun again; one that was stopped is continued. A lock for each run
lets several of these programs, the tasks of a Slurm array, work on one folder.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Settings
from pipeline.runtime.logbook import read_records
from pipeline.runtime.preemption import EXIT_TRY_AGAIN
from pipeline.storage.locks import take_lock
from pipeline.storage.whole_file import write_file

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED_JSON = ROOT / "ds_configs" / "zero1.json"
_SECONDS_BETWEEN_LOOKS = 0.1


class CommandFailedError(ValueError):
    """A command of the experiment ended with an error; the message names its log."""


class StoppedOnRequestError(Exception):
    """The experiment was asked to stop; the same command continues it."""


class Work(NamedTuple):
    """A command to run. name: of its log and lock. arguments: the script of launch/ and what follows it. is_done: looks whether
    its result is there."""

    name: str
    arguments: list[str]
    is_done: Callable[[], bool]


def training(directory: Path, name: str, settings: Settings) -> Work:
    """Write a run's recipe and return the command that trains by it."""
    recipe = directory / "recipes" / f"{name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    content = settings.to_yaml().encode()
    if not recipe.is_file() or recipe.read_bytes() != content:
        write_file(recipe, content)
    run_dir = directory / "runs" / name
    arguments = ["train.py", "--deepspeed", str(DEEPSPEED_JSON), "--config", str(recipe), "--run-dir", str(run_dir)]
    return Work(name, arguments, _Finished(run_dir, settings.training.steps, len(settings.data.validation_sets)))


@dataclass(frozen=True)
class _Finished:
    """True once a run has its last step's records, and the checkpoint of its end."""

    run_dir: Path
    steps: int
    num_sets: int

    def __call__(self) -> bool:
        """Look into the run directory."""
        if not (self.run_dir / "checkpoints" / f"step-{self.steps:08d}").is_dir():
            return False
        last = [record for record in read_records(self.run_dir) if record.get("split") == "validation"]
        return sum(record["step"] == self.steps for record in last) == self.num_sets


def run_all(works: Sequence[Work], directory: Path, slots: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Run commands that are not done, one at a time on each slot, until all are.

    slots: for each place the `cores` (a set) or the `gpu` (its number) of its commands.

    Raises:
        CommandFailedError: a command failed; the others are ended first.
        StoppedOnRequestError: a signal came; the commands were passed it, and have saved.
    """
    locks = directory / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    waiting, running, free = list(works), list[_Running](), list(slots)
    try:
        while waiting or running:
            for work in waiting[:]:
                if work.is_done():
                    waiting.remove(work)
                elif free and (started := _start(work, directory, free[0], locks)) is not None:
                    waiting.remove(work)
                    running.append(started)
                    free.pop(0)
            for each in [each for each in running if each.process.exitcode is not None]:
                running.remove(each)
                free.append(each.slot)
                each.end()
                say(f"{each.work.name}: done, {len(waiting) + len(running)} of {len(works)} to go")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.join()


class _Running(NamedTuple):
    work: Work
    process: Any
    slot: dict[str, Any]
    lock: Any
    log: Path

    def end(self) -> None:
        """Give back the lock, and raise what the exit code says."""
        self.process.join()
        self.lock.close()
        if self.process.exitcode == EXIT_TRY_AGAIN:
            raise StoppedOnRequestError
        if self.process.exitcode or not self.work.is_done():
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise CommandFailedError(
                f"{self.work.name}: exit code {self.process.exitcode}; {' '.join(last)}; its log is {self.log}"
            )


def _start(work: Work, directory: Path, slot: dict[str, Any], locks: Path) -> _Running | None:
    """Start a command; None if another program works on it."""
    lock = (locks / f"{work.name}.lock").open("a")
    # A child must not hold the lock on: files that Python opens are not inherited by a spawned process.
    if not take_lock(lock):
        lock.close()
        return None
    if work.is_done():
        lock.close()
        return None
    log = directory / "logs" / f"{work.name}.log"
    log.parent.mkdir(exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(work.arguments, str(log), slot))
    process.start()
    return _Running(work, process, slot, lock, log)


def _run(arguments: list[str], log: str, slot: dict[str, Any]) -> None:
    """Be a command of launch/, in a process of its own."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    # A Ctrl-C reaches the program above, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "gpu" in slot:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(slot["gpu"])
    else:
        os.sched_setaffinity(0, slot["cores"])
        os.environ["OMP_NUM_THREADS"] = str(len(slot["cores"]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        os.environ.pop(name, None)
    script = ROOT / "launch" / arguments[0]
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


def places(workers: int | None) -> list[dict[str, Any]]:
    """The places on which commands run: one a GPU, else one a core that this process may use; at most `workers`."""
    import torch

    found: list[dict[str, Any]]
    if torch.cuda.is_available():
        found = [{"gpu": number} for number in range(torch.cuda.device_count())]
    else:
        found = [{"cores": {core}} for core in sorted(os.sched_getaffinity(0))]
    return found[:workers]
