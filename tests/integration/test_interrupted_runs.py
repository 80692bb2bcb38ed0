"""Runs that are killed, stopped, and continued on other numbers of ranks, as their users' launchers start them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.report import audit, figures
from pipeline.runtime.logbook import read_records
from pipeline.runtime.metrics import OF_THE_MACHINE
from pipeline.runtime.preemption import EXIT_HANG
from tests.integration.test_command_line import ENVIRONMENT, SCRIPT, ZERO3, checkpoints

STEPS = 24


@pytest.fixture
def recipe(tiny_data: Path, tiny_reference: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{path: {tiny_data}/train, sequence_length: 16, global_batch: 8, num_workers: 0}}\n"
        "model: {dim: 16, num_layers: 2, num_attention_heads: 2}\n"
        f"reference: {{path: {tiny_reference}}}\n"
        f"training: {{steps: {STEPS}, warmup_steps: 2, learning_rate: 5.0e-3}}\n"
        "checkpoint: {every: 4}\n"
        "logging: {metrics_every: 1, progress_every: 1}\n",
        encoding="utf-8",
    )
    return path


class Ranks:
    """A job of some ranks, started as `srun` or `torchrun` would; its micro-step has 8 rows whatever their number."""

    def __init__(self, number: int, recipe: Path, run_dir: Path, *more: str) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        job = ENVIRONMENT | {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, SCRIPT, "--deepspeed", ZERO3, "--config", recipe, "--run-dir", run_dir]
        command += [f"data.micro_batch={8 // number}", *more]
        self.logs = [run_dir.with_name(f"{run_dir.name}-{time.time_ns()}-{rank}.log") for rank in range(number)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                started = subprocess.Popen(list(map(str, command)), env=environment, stdout=file, stderr=subprocess.STDOUT)
            self.processes.append(started)

    def wait_for(self, line: str) -> None:
        """Wait until the first rank has printed a line that begins so."""
        ends = time.monotonic() + 900
        while not re.search(rf"^{line}", self.logs[0].read_text(), re.MULTILINE):
            assert time.monotonic() < ends, self.logs[0].read_text()
            assert self.processes[0].poll() is None, self.logs[0].read_text()
            time.sleep(0.02)

    def end(self) -> list[int]:
        """The exit code of each rank, once all have ended."""
        return [process.wait(900) for process in self.processes]


def trained(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(run_dir) if "split" not in record]


@pytest.mark.slow
def test_a_run_continues_exactly_after_kills_and_with_other_numbers_of_ranks(recipe: Path, tmp_path: Path) -> None:
    assert Ranks(1, recipe, tmp_path / "whole").end() == [0]

    # One rank, killed while a checkpoint is being written or just after; then the same, killed between checkpoints.
    run_dir = tmp_path / "cut"
    for line in (r"step +8/24 ", r"saved step 8"):
        job = Ranks(1, recipe, run_dir)
        job.wait_for(line)
        job.processes[0].kill()
        assert job.end() == [-signal.SIGKILL]
    whole = trained(tmp_path / "whole")
    without_times = [
        {key: value for key, value in record.items() if key not in OF_THE_MACHINE}
        for record in (*whole[:8], *trained(run_dir)[:8])
    ]
    assert without_times[:8] == without_times[8:], "to the bit, on the same ranks"

    # Two ranks, asked to stop; four finish it.
    job = Ranks(2, recipe, run_dir)
    job.wait_for(r"saved step 12")
    (run_dir / "STOP").touch()
    assert job.end() == [75, 75]
    assert Ranks(4, recipe, run_dir).end() == [0, 0, 0, 0]

    found = trained(run_dir)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for record, expected in zip(found, whole, strict=True):
        assert (record["samples"], record["tokens"]) == (expected["samples"], expected["tokens"])
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert checkpoints(run_dir)[-1] == f"step-{STEPS:08d}"
    assert not list(run_dir.glob("checkpoints/*.partial"))
    assert_the_run_proves_it(run_dir)


def assert_the_run_proves_it(run_dir: Path) -> None:
    """Audit the run of four starts, two of which were killed; then the same with one bit of its newest weights flipped."""
    found = figures(audit(run_dir))
    assert found["sound"], found["problems"]
    assert [start["ranks"] for start in found["starts"]] == [1, 1, 2, 4]
    assert found["samples"]["steps_verified"] == STEPS + found["steps_abandoned"]
    assert found["steps_abandoned"] > 0
    assert [each["most"] for each in found["samples"]["sets"]] == [1]
    assert sum(found["wall_clock"]["percent"].values()) == pytest.approx(100, abs=1)
    assert all(found["wall_clock"]["by_kind"][kind] > 0 for kind in ("productive", "saving", "lost_work", "restarts"))

    weights = next((run_dir / "checkpoints" / checkpoints(run_dir)[-1]).glob("rank-00002.*"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 16
    weights.write_bytes(content)
    (problem,) = figures(audit(run_dir))["problems"]
    assert problem.startswith(f"{checkpoints(run_dir)[-1]}: {weights.name}: its bytes are not those that were written")


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_other_which_ends_with_the_code_for_it(recipe: Path, tmp_path: Path) -> None:
    job = Ranks(2, recipe, tmp_path / "run", "run.hang_timeout=20", "training.steps=100000", "checkpoint.every=100000")
    job.wait_for(r"step +20\b")
    # A beat is a second old at most: after two, rank 1's last one tells of a step.
    time.sleep(2)
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    assert job.end() == [EXIT_HANG, -signal.SIGKILL]
    assert time.monotonic() - started < 300, "torch would have ended it after ten minutes"

    told = re.search(
        r"cannot go on: rank 1 on \S+ \(process \d+\) has been silent for (\d+) s in training step", job.logs[0].read_text()
    )
    assert told, job.logs[0].read_text()
    assert int(told[1]) >= 20
