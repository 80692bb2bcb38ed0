"""The real scripts on a real Slurm of several nodes, with all that happens to a job there."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.logbook import read_records
from tests.forked import ROOT
from tests.lives import difference, left_by, live, write_recipe
from tests.slurm_cluster import CAN_RUN, GPU_NODE, NODES, Cluster, running_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_RUN, reason="needs root, and Debian's slurmctld, slurmd, slurm-client and munge"),
]

STEPS = 18
# Ranks wait before a step until the test has let it pass; they hear signals meanwhile.
GATE = """
import os, time
from pathlib import Path
from pipeline.runtime import heartbeat
real = heartbeat.enter
def enter(phase, step=0):
    while phase == "training" and step >= int(Path(os.environ["GATE"]).read_text() or 0):
        time.sleep(0.05)
    real(phase, step)
heartbeat.enter = enter
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Submitted:
    """A checkout of its own, a run directory, and the jobs that are submitted for it."""

    def __init__(self, cluster: Cluster, folder: Path, recipe: Path):
        self.checkout, self.run_dir, self.gate = folder / "checkout", folder / "run", folder / "gate"
        for name in ("launch", "pipeline", "ds_configs"):
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        train = self.checkout / "launch" / "train.py"
        train.write_text(train.read_text().replace("\nDEMO = ", f"{GATE}\nDEMO = "))
        (self.checkout / "launch" / "site.sh").write_text(
            f"export PATH={Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1\n"
        )
        shutil.copy(recipe, self.checkout / "launch" / "recipes" / "tiny.yaml")
        self._cluster, self._folder = cluster, folder
        self.log = folder / "job.log"

    def submit(self, nodes: int, gate: int, *options: str, more: Sequence[str] = (), **environment: str) -> str:
        """Submit the job, on so many nodes; its ranks wait before step `gate`. options: sbatch's. more: settings."""
        self.let_pass(gate)
        script = [*options, f"--nodes={nodes}", "--time=60", "launch/train.sbatch", "--config", "launch/recipes/tiny.yaml"]
        given = [f"--run-dir={self.run_dir}", f"data.micro_batch={16 // nodes}"]
        return self._cluster.submit(self.checkout, self.log, *script, *given, *more, GATE=str(self.gate), **environment)

    def let_pass(self, steps: int) -> None:
        partial = self.gate.with_suffix(".partial")
        partial.write_text(str(steps))
        os.replace(partial, self.gate)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: any(record["step"] >= step for record in self.records()), self.shown)

    def records(self) -> list[dict[str, Any]]:
        return read_records(self.run_dir) if (self.run_dir / "metrics.jsonl").exists() else []

    def lives(self, job: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "slurm" / job / "lives.jsonl").read_text().splitlines()]

    def shown(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def wait_until(is_so: Callable[[], bool], why: Callable[[], str], seconds: float = 900) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, why()
        assert "slurm: error" not in why(), why()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", tiny_data, tiny_reference, STEPS)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves that two ranks make in one go."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert live(run_dir, recipe, 2).codes == [0, 0]
    return left_by(run_dir)


def process_of(rank: int, run_dir: Path) -> int:
    """The number of the process of a rank of the job in a run directory."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        is_rank = b"launch/train.py" in command and f"--run-dir={run_dir}".encode() in command and b"srun" not in command
        if is_rank and f"SLURM_PROCID={rank}\0".encode() in environment and b"SLURM_STEP_ID=0\0" in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_a_job_goes_on_by_itself_after_a_rank_died_and_at_its_time_limit(
    cluster: Cluster, recipe: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    made = Submitted(cluster, tmp_path, recipe)
    job = made.submit(2, 5, "--array=1")

    # A rank is killed: the job goes on without its node. The checkout is edited meanwhile.
    made.wait_for_step(4)
    (made.checkout / "pipeline" / "train.py").write_text("raise SystemExit('edited')")
    (made.checkout / "launch" / "recipes" / "tiny.yaml").write_text("model: {dim: 8}")
    os.kill(process_of(1, made.run_dir), 9)
    cluster.wait_for(job, "PENDING")
    assert (made.lives(job)[0]["code"], made.lives(job)[0]["accused"]) == (137, "n2"), made.shown()

    # The time limit comes near: Slurm itself asks the job to stop.
    made.let_pass(10)
    cluster.wait_for(job, "RUNNING")
    made.wait_for_step(9)
    assert cluster.property(job, "NodeList") == "n[1,3]"
    minutes = int(cluster.property(job, "RunTime").split(":")[1]) + 2
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_until(lambda: made.shown().count("asked to stop by SIGUSR1") == 1, made.shown)
    made.let_pass(100)
    cluster.wait_for(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    # The last life ends well, and the run is the one that nothing had happened to.
    assert cluster.wait_for(job) == "COMPLETED", made.shown()
    assert difference(left_by(made.run_dir), uninterrupted) == ""
    assert [life["requeue"] for life in made.lives(job)] == [True, True, False]
    assert [life["code"] for life in made.lives(job)] == [137, 75, 0]
    assert made.shown().count("the job cannot go on: rank 1 on ") == 1
    assert made.shown().count("Thread 0x") <= 12, "the stacks of one rank alone"


def test_a_job_goes_on_after_a_more_urgent_one_and_after_the_failure_of_a_node(
    cluster: Cluster, recipe: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    made = Submitted(cluster, tmp_path, recipe)
    job = made.submit(2, gate=5)
    made.wait_for_step(4)

    # PreemptMode=REQUEUE: Slurm signals the ranks, and takes the nodes after the partition's GraceTime.
    wanted = ["--partition=urgent", f"--nodes={len(NODES)}", "--exclusive", "--wrap=sleep 2"]
    urgent = cluster.submit(made.checkout, tmp_path / "urgent.log", *wanted)
    wait_until(lambda: "asked to stop by SIG" in made.shown(), made.shown)
    made.let_pass(8)
    assert cluster.wait_for(job, "PENDING") == "PENDING", made.shown()
    assert cluster.wait_for(urgent) == "COMPLETED"
    assert [(life["code"], life["requeue"]) for life in made.lives(job)] == [(75, True)]

    # A node fails: Slurm itself puts the job into the queue again.
    cluster.wait_for(job, "RUNNING")
    made.wait_for_step(7)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    assert cluster.wait_for(job, "PENDING") == "PENDING", made.shown()
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    made.let_pass(100)
    assert cluster.wait_for(job) == "COMPLETED", made.shown()
    assert difference(left_by(made.run_dir), uninterrupted) == ""


def test_a_persons_stop_is_no_reason_to_go_on_and_the_nodes_may_change(
    cluster: Cluster, recipe: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    made = Submitted(cluster, tmp_path, recipe)
    first = made.submit(2, gate=5)
    made.wait_for_step(4)
    cluster.run("scancel", "--signal=USR1", first)
    wait_until(lambda: "asked to stop by SIGUSR1" in made.shown(), made.shown)
    made.let_pass(100)
    assert cluster.wait_for(first) == "FAILED"
    assert cluster.property(first, "ExitCode") == "75:0"
    assert "not put into the queue again by this script: it was asked to stop by a person" in made.shown()

    second = made.submit(1, gate=10)
    made.wait_for_step(9)
    (made.run_dir / "STOP").touch()
    made.let_pass(100)
    assert cluster.wait_for(second) == "FAILED"
    assert cluster.property(second, "ExitCode") == "75:0"

    # From within another job, whose GPUs and bindings sbatch passes on.
    third = made.submit(2, 100, SLURM_GPUS_PER_TASK="1", SLURM_MEM_PER_CPU="100", SLURM_NTASKS_PER_GPU="1")
    assert cluster.wait_for(third) == "COMPLETED", made.shown()
    last, expected = made.records()[-1], uninterrupted["records"][-1]
    assert last["step"] == expected["step"] == STEPS
    assert [last[f"loss_head_{head}"] for head in range(4)] == pytest.approx(
        [expected[f"loss_head_{head}"] for head in range(4)], rel=1e-5
    )


def test_a_job_that_cannot_work_says_so_within_seconds(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    made = Submitted(cluster, tmp_path, recipe)
    on_gpus = made.submit(1, 100, "--partition=gpu", f"--nodelist={GPU_NODE}")
    assert cluster.wait_for(on_gpus) == "FAILED"
    assert cluster.property(on_gpus, "ExitCode") == "2:0"
    assert "add --gpus-per-node=2 --ntasks-per-node=2 to sbatch's options" in made.shown()
    assert "loading torch" not in made.shown()

    # A mistake that only ranks can see: srun ends the other rank, which then exits with 75, and has that for the job's code.
    wrong = made.submit(2, 100, more=["data.path=/nowhere"])
    assert cluster.wait_for(wrong) == "FAILED"
    assert cluster.property(wrong, "ExitCode") == "2:0"
    assert made.shown().count("data.path: ") == 1

    cancelled = made.submit(1, 100, "--no-requeue")
    assert cluster.wait_for(cancelled, "RUNNING") == "RUNNING"
    cluster.run("scancel", cancelled)
    started = time.monotonic()
    assert cluster.wait_for(cancelled) == "CANCELLED"
    wait_until(lambda: cluster.run("squeue", "-h", "-j", cancelled) == "", made.shown)
    assert time.monotonic() - started < 300, "what Slurm kills at last has not ended by itself"
    assert set(cluster.run("sinfo", "-h", "-N", "-o", "%N").split()) == {*NODES, GPU_NODE}


def test_an_array_prepares_data_and_a_job_after_it_joins_the_parts_and_another_scores_them(
    cluster: Cluster, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    made = Submitted(cluster, tmp_path, recipe)
    inputs, output = tmp_path / "in", tmp_path / "a mix"
    inputs.mkdir()
    for number in range(2):
        lines = "".join(json.dumps({"text": f"{number} {line} the cat sees the dog"}) + "\n" for line in range(3000))
        (inputs / f"{number}.jsonl").write_text(lines)
    given = [
        "launch/prepare.sbatch",
        f"--input={inputs}",
        f"--tokenizer={tiny_data}",
        "--sequence-length=16",
        "--output",
        output,
    ]
    array = cluster.submit(made.checkout, tmp_path / "prepare-%a.log", "--array=1-2", *given)
    wait_until(lambda: (output / "manifest.json").exists(), lambda: "\n".join(map(Path.read_text, tmp_path.glob("*.log"))))
    assert sorted(path.name for path in Path(f"{output}.parts").iterdir()) == ["00001", "00002"]
    assert cluster.property(array, "ArrayJobId") == array

    # Scored on two nodes, by the checkout's recipe; some sites pass no variable on by default.
    given = ["launch/score.sbatch", "--config", "launch/recipes/tiny.yaml", f"--run-dir={made.run_dir}"]
    score = cluster.submit(made.checkout, made.log, "--nodes=2", "--export=NONE", *given, f"--output={tmp_path}/losses")
    assert cluster.wait_for(score) == "COMPLETED", made.shown()
    assert list((tmp_path / "losses").rglob("manifest.json"))
