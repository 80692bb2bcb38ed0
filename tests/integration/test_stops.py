"""Requests to stop wherever they come, and launchers that are killed: the same command goes on to the same result."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import processes
from pipeline.config import Settings
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.runtime import preemption
from pipeline.runtime.logbook import read_records
from pipeline.runtime.metrics import OF_THE_MACHINE
from pipeline.runtime.preemption import EXIT_HANG
from tests.integration.test_command_line import ENVIRONMENT, SCRIPT, ZERO3, checkpoints
from tests.integration.test_interrupted_runs import Ranks, recipe
from tests.integration.test_pipeline_rho1 import job_on_this_rank, settings_for
from tests.ranks import run_ranks

__all__ = ["recipe"]


# In validations, of one process that signals itself.


def run_job_until(settings: Settings, run_dir: Path, signal_in: int | None) -> int | str:
    """Run a job, with a signal after the first micro-batch of its validation number `signal_in`, from 0, if it comes to it."""
    from pipeline.job import run_job

    number, batches = iter(range(100)), HeldOutRows.batches

    def signalling(held_out: HeldOutRows) -> Iterator[Batch]:
        is_meant = next(number) == signal_in
        for batch in batches(held_out):
            yield batch
            if is_meant:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutRows, "batches", signalling)
        try:
            return run_job(job_on_this_rank(settings, run_dir), preemption.StopRequest())
        except preemption.StoppedError:
            return "nothing to save"


def run_jobs(settings: Settings, run_dir: Path, signals_in: list[int | None]) -> list[tuple[int | str, list[str]]]:
    """(exit code, checkpoints) of one start after the other."""
    return [(run_job_until(settings, run_dir, each), checkpoints(run_dir)) for each in signals_in]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    timed = OF_THE_MACHINE
    return [{key: value for key, value in record.items() if key not in timed} for record in read_records(run_dir)]


@pytest.mark.slow
def test_a_validation_that_was_broken_off_is_made_up_for_and_the_records_are_those_of_an_uninterrupted_run(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        tiny_data,
        tiny_reference,
        "training.steps=4",
        "logging.validation_every=2",
        "data.num_workers=0",
        f"data.validation_path={{a: {tiny_data}/validation, b: {tiny_data}/train}}",
        "logging.validation_samples=16",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(run_jobs, 1, settings, whole, [None]) == [[(0, ["step-00000004"])]]

    # In the first folder before any step; in the second after step 2; in the last validation of all; in the one made up for.
    (found,) = run_ranks(run_jobs, 1, settings, cut, [0, 3, 1, 0, None])
    assert found == [
        ("nothing to save", []),
        (75, ["step-00000002"]),
        (75, ["step-00000002", "step-00000004"]),
        ("nothing to save", ["step-00000002", "step-00000004"]),
        (0, ["step-00000002", "step-00000004"]),
    ]
    assert [(line["step"], line.get("set")) for line in lines(cut)] == [
        *((0, "a"), (0, "b"), (1, None), (2, None), (2, "a"), (2, "b"), (3, None), (4, None), (4, "a"), (4, "b"))
    ]
    assert lines(cut) == lines(whole)


# In the start.


def prepare_until_signalled(settings: Settings, run_dir: Path) -> tuple[str, list[str]]:
    from pipeline.job import run_job

    stop = preemption.StopRequest()
    os.kill(os.getpid(), signal.SIGUSR1)
    try:
        return str(run_job(job_on_this_rank(settings, run_dir), stop)), []
    except preemption.StoppedError:
        return "nothing to save", [path.name for path in run_dir.iterdir() if path.name != ".lock"]


def test_a_signal_while_the_built_in_data_is_prepared_leaves_nothing_half_made(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, tmp_path, "data.builtin=true", "data.path=null", "data.validation_path=null")
    settings = settings.with_values(reference={"path": None}, training={"k_percent": 1.0}, data={"sequence_length": 128})
    assert run_ranks(prepare_until_signalled, 1, settings, tmp_path / "run") == [("nothing to save", ["events.jsonl"])]


@pytest.mark.slow
def test_a_rank_that_waits_for_the_others_to_come_ends_at_a_signal(recipe: Path, tmp_path: Path) -> None:
    job = Ranks(2, recipe, tmp_path / "run")
    job.processes[1].kill()
    job.wait_for("selective multi-token prediction: loading")
    time.sleep(15)
    started = time.monotonic()
    job.processes[0].terminate()
    assert job.end() == [75, -signal.SIGKILL]
    assert time.monotonic() - started < 600, "it waits for half an hour otherwise"
    assert not (tmp_path / "run").exists()


# A launcher that is killed.

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
    "deepspeed --hostfile": [
        "deepspeed",
        "--hostfile",
        "hosts",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
    ],
}
PDSH = f"""#!{sys.executable}
# In place of pdsh: runs the command for each host on this machine, and returns the highest code, as `pdsh -S` does.
import subprocess, sys

after = sys.argv.index("-w") + 1
hosts, command = sys.argv[after].split(","), " ".join(sys.argv[after + 1 :])
running = [subprocess.Popen(["bash", "-c", command.replace("%n", str(number))]) for number in range(len(hosts))]
sys.exit(max(process.wait() for process in running))
"""


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def ranks_below(pid: int) -> list[processes.Process]:
    """The ranks of a job, which descend from its launcher."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        process = above = processes.find(int(folder.name))
        while above is not None and above.pid != pid:
            above = above.parent
        if above is not None and str(SCRIPT) in process.command[:3]:
            found.append(process)
    return found


class Launched:
    """A job of two ranks under a launcher, which has made some steps; ended with all its processes at the end of a `with`."""

    def __init__(self, launcher: str, recipe: Path, folder: Path) -> None:
        self.run_dir, self._log = folder / "run", folder / "log"
        program, *options = LAUNCHERS[launcher]
        start = ["-m", program] if "." in program else [str(Path(sys.executable).with_name(program))]
        job = [SCRIPT, "--deepspeed", ZERO3, "--config", recipe, "--run-dir", self.run_dir, "data.micro_batch=4"]
        job += ["training.steps=100000", "checkpoint.every=100000"]
        command = [sys.executable, *start, *options, free_port(), *map(str, job)]
        (folder / "hosts").write_text("one slots=1\ntwo slots=1\n")
        (folder / "pdsh").write_text(PDSH)
        (folder / "pdsh").chmod(0o755)
        environment = ENVIRONMENT | {"PATH": f"{folder}:{os.environ['PATH']}"}
        with self._log.open("w") as file:
            self.runner = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
            )
        self.ranks: dict[int, processes.Process] = {}

    def __enter__(self) -> "Launched":
        self._wait(lambda: re.search(r"^step +3/", self.said, re.MULTILINE) or self.runner.poll() is not None, 300)
        for process in ranks_below(self.runner.pid):
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            self.ranks[next(int(each[5:]) for each in variables if each.startswith(b"RANK="))] = process
        assert sorted(self.ranks) == [0, 1], self.said
        # A beat is a second old at most: after two, each rank's last one tells of a step.
        time.sleep(2)
        return self

    def __exit__(self, *details: object) -> None:
        self.runner.kill()
        for rank in self.ranks.values():
            rank.kill()
        self.runner.wait()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for_the_ranks_end(self) -> None:
        self._wait(lambda: not any(rank.is_alive for rank in self.ranks.values()), 120)

    def _wait(self, condition: Callable[[], object], seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, self.said
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_save_and_end_when_their_launcher_is_killed(launcher: str, recipe: Path, tmp_path: Path) -> None:
    with Launched(launcher, recipe, tmp_path) as job:
        job.runner.kill()
        job.runner.wait()
        job.wait_for_the_ranks_end()
        # Whichever looked first; then they agreed.
        assert f": its launcher is gone (process {job.runner.pid})" in job.said, job.said
        (step,) = re.findall(r"^stopped on request after step (\d+)", job.said, re.MULTILINE)
        assert checkpoints(job.run_dir) == [f"step-{int(step):08d}"]


@pytest.mark.slow
def test_not_even_a_suspended_rank_is_left_behind_by_its_launcher(recipe: Path, tmp_path: Path) -> None:
    with Launched("deepspeed", recipe, tmp_path) as job:
        os.kill(job.ranks[1].pid, signal.SIGSTOP)
        job.runner.kill()
        job.runner.wait()
        job.wait_for_the_ranks_end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "codes"), [("deepspeed", (247, EXIT_HANG)), ("torchrun", (1,)), ("deepspeed --hostfile", (247,))]
)
def test_a_rank_that_is_killed_is_named_and_the_launcher_ends_as_readme_says(
    launcher: str, codes: tuple[int, ...], recipe: Path, tmp_path: Path
) -> None:
    with Launched(launcher, recipe, tmp_path) as job:
        job.ranks[1].kill()
        job.wait_for_the_ranks_end()
        assert job.runner.wait(600) in codes
        assert re.search(r"the job cannot go on: rank 1 on \S+ \(process \d+\) died in training step", job.said), job.said
