"""A run in several lives: the ranks of `launch/train.py` as processes that are forked, and what they leave to be compared."""

import multiprocessing
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.runtime.checkpoint.folders import saved_steps, step_name
from pipeline.runtime.checkpoint.state import STATE_FILE, read_state
from pipeline.runtime.logbook import read_records
from tests.drawn import scalars
from tests.forked import ROOT, as_main, call, forking
from tests.tiny import SEQUENCE_LENGTH

ROWS = 32
_CLOCKS = re.compile(r"tokens_per_second|data_wait|seconds|time|memory|mfu")
_PATIENCE_SECONDS = 1500

Alter = Callable[..., None]
"""Called in a rank's process before the command, with the rank, a MonkeyPatch and further arguments."""


class Life(NamedTuple):
    """What became of a life: each rank's exit code, what each printed, and the seconds that it lasted."""

    codes: list[int | None]
    printed: list[str]
    seconds: float


def write_recipe(path: Path, data: Path, reference: Path, steps: int) -> Path:
    """A tiny job whose step has two micro-steps of 16 rows, whatever the number of ranks, and saves every third step."""
    path.write_text(
        f"data: {{path: {data}/train, validation_path: {data}/validation, sequence_length: {SEQUENCE_LENGTH}, "
        f"global_batch: {ROWS}, num_workers: 0}}\n"
        "model: {dim: 16, num_layers: 2, num_attention_heads: 2}\n"
        f"reference: {{path: {reference}}}\n"
        f"training: {{steps: {steps}, warmup_steps: 2, learning_rate: 5.0e-3}}\n"
        "checkpoint: {every: 3}\n"
        "logging: {metrics_every: 1, progress_every: 1, validation_every: 5, validation_samples: 8}\n",
        encoding="utf-8",
    )
    return path


def live(
    run_dir: Path,
    recipe: Path,
    ranks: int,
    alter: Alter | None = None,
    *given: Any,
    settings: Sequence[str] = (),
    die_together: bool = False,
) -> Life:
    """Run the ranks of a job to their end, each altered as asked.

    die_together: once a rank was killed kill the others too, as when a machine dies.
    """
    started = time.monotonic()
    command = [ROOT / "launch" / "train.py", "--deepspeed", ROOT / "ds_configs" / "zero3.json", "--config", recipe]
    command += ["--run-dir", run_dir, f"data.micro_batch={ROWS // 2 // ranks}", *settings]
    job = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    logs = [run_dir.with_name(f"{run_dir.name}-{time.time_ns()}-{rank}.log") for rank in range(ranks)]

    processes = []
    for rank, log in enumerate(logs):
        given_to_rank = (rank, list(map(str, command)), job | {"RANK": rank, "LOCAL_RANK": rank}, log, alter, given)
        processes.append(forking().Process(target=call, args=(_run_rank, *given_to_rank)))
        processes[-1].start()
    _wait_for(processes, started + _PATIENCE_SECONDS, die_together)
    return Life([each.exitcode for each in processes], [log.read_text() for log in logs], time.monotonic() - started)


def _wait_for(processes: Sequence[Any], deadline: float, die_together: bool) -> None:
    while any(process.exitcode is None for process in processes):
        is_killed = die_together and any((process.exitcode or 0) < 0 for process in processes)
        if is_killed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _run_rank(rank: int, command: list[str], job: dict[str, Any], log: Path, alter: Alter | None, given: Sequence[Any]) -> None:
    # A process of the fork server would have it start the loader's workers too, without what was altered here.
    multiprocessing.set_start_method("fork", force=True)
    # SLURM_CPUS_ON_NODE: one thread; the model is so small that a second one only waits.
    environment = os.environ | {name: str(value) for name, value in (job | {"SLURM_CPUS_ON_NODE": 1}).items()}
    with pytest.MonkeyPatch.context() as patch:
        if alter is not None:
            alter(rank, patch, *given)
        as_main(command, environment, ROOT, [log, log], False)


def without_clocks(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what no two runs have alike: times and memory."""
    return [{key: value for key, value in record.items() if not _CLOCKS.search(key)} for record in records]


def left_by(run_dir: Path) -> dict[str, Any]:
    """All that must be equal of two runs: every record but its clocks, the same as TensorBoard draws it, and the last
    checkpoint, by the hashes of its files."""
    records = without_clocks(read_records(run_dir))
    newest = step_name(saved_steps(run_dir / "checkpoints")[0])
    state = read_state(run_dir / "checkpoints" / newest / STATE_FILE)
    identity = {key: value for key, value in state.identity.items() if key != "data.num_workers"}
    curves = {place: points for place, points in scalars(run_dir).items() if not place[1].startswith("wall_clock/")}
    return {"records": records, "curves": curves, "state": state.model_dump(mode="json") | {"identity": identity}}


def difference(found: dict[str, Any], expected: dict[str, Any], but_steps: Sequence[int] = ()) -> str:
    """Name the first thing that differs between what two runs left; "" where nothing does.

    but_steps: their records of training, and what is drawn of these steps, are not compared.
    """
    both = [
        [record for record in left["records"] if "split" in record or record["step"] not in but_steps]
        for left in (found, expected)
    ]
    steps = [[(record["step"], record.get("split")) for record in records] for records in both]
    if steps[0] != steps[1]:
        return f"records of {steps[0]}, expected {steps[1]}"
    for one, other in zip(*both, strict=True):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        if keys:
            return f"step {one['step']}: {keys[0]} is {one.get(keys[0])}, expected {other.get(keys[0])}"
    curves = [
        {place: [point for point in points if point[0] not in but_steps] for place, points in left["curves"].items()}
        for left in (found, expected)
    ]
    for place in sorted({**curves[0], **curves[1]}):
        points = [each.get(place) for each in curves]
        if points[0] != points[1]:
            return f"TensorBoard draws {place[1]} of {place[0] or 'the run'} through {points[0]}, expected {points[1]}"
    keys = [key for key in expected["state"] if found["state"][key] != expected["state"][key]]
    return f"the last checkpoint's {', '.join(keys)}" if keys else ""
