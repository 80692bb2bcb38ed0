"""A job on Slurm before its ranks start, and the logs that it keeps; Slurm's commands are stand-ins."""

import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import ANY

import pytest

from pipeline.slurm import batch_job, before_start
from pipeline.slurm.batch_job import Job, as_submitted, find_job
from pipeline.slurm.before_start import ON_CPU, StartError, add_to_environment, check_gpus, meeting_address, meeting_port
from pipeline.slurm.commands import name_of
from pipeline.slurm.rank_logs import Ended, Follower, accused_rank, ends_of_ranks, last_words, rank_file
from pipeline.slurm.ranks import options_of_step
from pipeline.slurm.requeueing import Decision
from tests.forked import ROOT

UNKNOWN = "no-such-node.invalid"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for Slurm's commands, first in the path."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def answer(folder: Path, command: str, text: str) -> None:
    path = folder / command
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)


def test_a_job_without_gpus_on_nodes_that_have_some_is_refused_with_the_options_to_add(slurm: Path) -> None:
    answer(slurm, "sinfo", "gpu:a100:8(S:0-1)\ngpu:a100:8(S:0-1)")
    job = {"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
    with pytest.raises(StartError, match=r"g\[1-2\] have GPUs .* --gpus-per-node=8 --ntasks-per-node=8"):
        check_gpus(job)
    assert check_gpus(job | {ON_CPU: "1"}) is None
    assert "--ntasks-per-node=8 uses them all" in str(check_gpus(job | {"SLURM_GPUS_ON_NODE": "8"}))
    assert check_gpus(job | {"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "8(x2)"}) is None
    answer(slurm, "sinfo", "(null)\n(null)")
    assert check_gpus(job) is None


def test_the_first_node_is_looked_up_before_anybody_waits_for_it(slurm: Path) -> None:
    answer(slurm, "scontrol", "localhost\nother")
    assert meeting_address("ignored") == "localhost"

    # A name that only Slurm knows has an address there.
    (slurm / "scontrol").write_text(
        f"#!/bin/sh\ncase $2 in hostnames) echo {UNKNOWN} ;; *) echo NodeName={UNKNOWN} NodeAddr=127.0.0.1 Port=1 ;; esac\n"
    )
    assert meeting_address("ignored") == "127.0.0.1"
    answer(slurm, "scontrol", UNKNOWN)
    with pytest.raises(StartError, match=f"{UNKNOWN}, cannot be looked up .* set MASTER_ADDR in launch/site.sh"):
        meeting_address("ignored")


def test_an_address_that_the_shell_still_had_is_refused_where_the_ranks_could_not_meet_there(slurm: Path) -> None:
    answer(slurm, "scontrol", "n1\nn2")
    for given, expected in (("localhost", "each machine's own, and the job has 2 nodes"), (UNKNOWN, "cannot be looked up on")):
        with pytest.raises(StartError, match=f"MASTER_ADDR={given} .*{expected}.*; unset it, so that the ranks meet on n1"):
            meeting_address("ignored", given)
    with pytest.raises(StartError, match=r"MASTER_ADDR=192\.0\.2\.7 is no address of the first node, n1; unset it"):
        meeting_address("ignored", "192.0.2.7")
    answer(slurm, "scontrol", "n1")
    assert meeting_address("ignored", "127.0.0.1") == "127.0.0.1"


def test_the_port_is_free_and_outside_of_the_ephemeral_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = meeting_port("41", {})
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first < lowest
    with socket.socket() as server:
        server.bind(("", first))
        server.listen()
        assert first < meeting_port("41", {}) < lowest
        with pytest.raises(StartError, match=f"MASTER_PORT={first} is in use"):
            meeting_port("41", {"MASTER_PORT": str(first)})
    assert meeting_port("41", {"MASTER_PORT": str(first)}) == first

    # A site whose ephemeral ports begin at 1024 or 10,000.
    (tmp_path / "range").write_text("10000 65535\n")
    monkeypatch.setattr(before_start, "_EPHEMERAL_RANGE", tmp_path / "range")
    assert 1024 <= meeting_port("41", {}) < 10000


def test_the_ranks_have_the_variables_of_the_batch_script_and_the_cores_of_a_task() -> None:
    assert options_of_step({"SLURM_CPUS_PER_TASK": "8", "SLURM_EXPORT_ENV": "NONE"}) == ["--export=ALL", "--cpus-per-task=8"]
    assert options_of_step({}) == ["--export=ALL"]


def test_a_job_that_is_submitted_from_within_another_one_has_ranks_of_its_own(slurm: Path) -> None:
    answer(slurm, "scontrol", "n1 TresPerNode=gres:gpu:2 MinMemoryNode=0 ReqB:S:C:T=0:0:*:*")
    outer = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SRUN_CPUS_PER_TASK": "2"}
    outer |= {"SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu:3", "SLURM_MEM_PER_CPU": "100"}
    outer |= {"SLURM_THREADS_PER_CORE": "1"}
    outer |= {"SLURM_NTASKS_PER_GPU": "1", "SLURM_CPUS_PER_GPU": "8", "SLURM_GPUS_PER_SOCKET": "1", "SLURM_CONSTRAINT": "a100"}
    outer |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_PER_NODE": "2", "SLURM_MEM_PER_NODE": "0"}
    own |= {"SLURM_CPUS_PER_TASK": "8", "MASTER_ADDR": "0.0.0.0"}
    added = {"MASTER_PORT": ANY, "PYTHONUNBUFFERED": "1"}
    assert add_to_environment(outer | own) == own | added
    own |= {"SLURM_THREADS_PER_CORE": "1"}
    answer(slurm, "scontrol", "n1 TresPerNode=gres:gpu:2 MinMemoryNode=0 ReqB:S:C:T=0:0:*:1")
    assert add_to_environment(outer | own) == own | added


def test_the_ends_of_ranks_are_read_from_the_lines_of_srun() -> None:
    lines = [
        "srun: error: n2: task 1: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=2.0",
        "srun: error: n1: tasks 0,2-3: Exited with exit code 4",
        "srun: error: n3: task 4: Segmentation fault (core dumped)",
        "a rank's own words",
    ]
    ends = [Ended("n2", 1, None), *(Ended("n1", rank, 4) for rank in (0, 2, 3)), Ended("n3", 4, None)]
    assert ends_of_ranks(lines) == ends


def test_the_jobs_log_gets_the_message_of_one_rank(tmp_path: Path) -> None:
    rank_file(tmp_path, 0, "err").write_text("")
    rank_file(tmp_path, 1, "err").write_text("rank 1 on a: the job cannot go on: rank 3 on b died in training step 7\n")
    rank_file(tmp_path, 2, "err").write_text("\n".join(f"line {number}" for number in range(100)))
    assert accused_rank(tmp_path) == (1, 3)
    assert last_words(tmp_path, [0, 1, 2]).splitlines()[1].startswith("rank 1 on a: ")
    long = last_words(tmp_path, [2]).splitlines()
    assert (long[1], long[-1], len(long)) == ("… (40 lines before)", "line 99", 62)
    assert last_words(tmp_path, [0, 9]) == ""

    # The message that names the lost rank is not lost behind stacks, however long they are.
    stacks = "".join(f"  File {number}\n" for number in range(200))
    rank_file(tmp_path, 3, "err").write_text(f"a warning\nrank 3 on a: the job cannot go on: rank 1 on b died\n{stacks}")
    shown = last_words(tmp_path, [3]).splitlines()
    assert shown[1:3] == ["… (1 lines before)", "rank 3 on a: the job cannot go on: rank 1 on b died"]
    assert shown[-1] == "… (141 lines after)"


def test_the_first_ranks_output_is_followed_as_it_grows(tmp_path: Path) -> None:
    stream = io.StringIO()
    follower = Follower(tmp_path / "out", stream, "asked to stop")
    with (tmp_path / "out").open("w") as file:
        for text in ("step 1\n", "asked to ", "stop by SIGUSR1\n", "no line break"):
            file.write(text)
            file.flush()
            time.sleep(0.05)
    assert follower.seen.wait(30)
    follower.end(30)
    assert stream.getvalue() == (tmp_path / "out").read_text()


def test_a_python_without_the_packages_is_no_mistake_in_the_recipe(slurm: Path) -> None:
    python = slurm / "python3"
    for code, expected in (
        (1, r"python3 \(.*/python3\) cannot run train.py, .* set it up in launch/site.sh"),
        (2, "the recipe"),
    ):
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
        with pytest.raises(StartError, match=expected):
            find_job("train.py", [])


@pytest.mark.parametrize(("requeue", "again"), [("1", True), ("0", False)])
def test_a_job_of_no_requeue_is_on_record_as_not_put_into_the_queue_again(slurm: Path, requeue: str, again: bool) -> None:
    answer(slurm, "scontrol", f"JobId=7 Requeue={requeue} Restarts=0")
    job = Job("7", "7", 0, ["n1"], "train.py", [], slurm)
    decision = as_submitted(job, Decision(True, "Slurm asked it to stop"))
    assert decision.requeue is again
    assert again or decision.why.startswith("it was submitted with --no-requeue (Slurm asked it to stop)")


def test_a_batch_script_needs_no_package_of_the_ranks() -> None:
    """The machine that runs it may have torch in a container only. -S: without site-packages."""
    command = [sys.executable, "-S", "-c", "import sys; import pipeline.slurm.batch_job as job; print(job.__file__)"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.stdout == f"{ROOT}/pipeline/slurm/batch_job.py\n", done.stderr


def test_an_array_prepares_in_the_container_and_its_joining_job_is_charged_as_it_is(slurm: Path) -> None:
    for command in ("sbatch", "contained"):
        (slurm / command).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{slurm}/{command}.txt\n')
        (slurm / command).chmod(0o755)
    task = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    task |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_PARTITION": "cpu", "SLURM_JOB_ACCOUNT": "lab a"}
    command = ["bash", ROOT / "launch" / "prepare.sbatch", "--input=in", f"--output={slurm}/a mix"]
    # A count of restarts that is another job's, and a path with a space.
    task |= {"SLURM_RESTART_COUNT": "2", "SELECTIVE_MTP_CONTAINER": "contained --bind '/my data'"}
    answer(slurm, "scontrol", "JobId=9 Requeue=1 Restarts=0 BatchFlag=1")
    subprocess.run(command, env=os.environ | task, check=True)

    inside = (slurm / "contained.txt").read_text().splitlines()
    assert inside[:5] == ["--bind", "/my data", "python3", "launch/prepare.py", "--input=in"]
    joining = (slurm / "sbatch.txt").read_text().splitlines()
    assert {"--partition=cpu", "--account=lab a", "--export=ALL", "--dependency=afterok:9"} <= set(joining)
    assert not any(option.startswith("--qos") for option in joining)
    assert joining[-1].startswith("--wrap=contained --bind /my\\ data python3 launch/shards.py merge ")
    # A task that Slurm put into the queue again has submitted it before.
    (slurm / "sbatch.txt").unlink()
    answer(slurm, "scontrol", "JobId=9 Requeue=1 Restarts=1 BatchFlag=1")
    subprocess.run(command, env=os.environ | task, check=True)
    assert not (slurm / "sbatch.txt").exists()


@pytest.mark.parametrize("name", ["train", "score"])
def test_a_task_of_an_array_has_its_number_in_its_settings_and_is_known_by_it(slurm: Path, name: str) -> None:
    (slurm / "python3").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{slurm}/python3.txt\nenv >{slurm}/environment.txt\n')
    (slurm / "python3").chmod(0o755)
    task = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    settings = ["run.name=mine a-%a", "model.seed=%a", "data.shards=https://host/%ab.tar"]

    def arguments() -> list[str]:
        command = ["bash", ROOT / "launch" / f"{name}.sbatch", *settings]
        bindings = {"SLURM_CPU_BIND": "mask_cpu:0x3", "SLURM_CPU_BIND_LIST": "0x3", "SLURM_MEM_BIND_TYPE": "none"}
        subprocess.run(command, env=os.environ | task | bindings, check=True)
        return (slurm / "python3.txt").read_text().splitlines()[-4:]

    replaced = [f"{name}.py", "run.name=mine a-3", "model.seed=3", settings[2]]
    answer(slurm, "scontrol", "JobId=9 ArrayJobId=9 ArrayTaskId=3")
    assert arguments() == replaced
    # Its cores are not those of the job that submitted it.
    assert "_BIND" not in (slurm / "environment.txt").read_text()
    (slurm / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    assert arguments() == replaced
    answer(slurm, "scontrol", "JobId=9 JobName=x")
    assert arguments() == [f"{name}.py", *settings]

    assert name_of({"SLURM_JOB_ID": "9"}) == "9"
    # Slurm tells a task of an array from a job that was submitted by one.
    answer(slurm, "scontrol", "JobId=9 ArrayJobId=9 ArrayTaskId=3")
    assert name_of(task) == "9_3"
    assert name_of(task | {"SLURM_JOB_ID": "12"}) == "12"


@pytest.mark.parametrize("name", ["train", "score"])
def test_a_job_that_was_requeued_finds_the_code_that_it_keeps_below_the_home_folder(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "runs of mine" / "slurm" / "9" / "code" / "launch" / "slurm_job.sh"
    kept.parent.mkdir(parents=True)
    kept.write_text('echo "kept $1"')
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "1", "HOME": str(tmp_path)}
    command = ["bash", ROOT / "launch" / f"{name}.sbatch", "--run-dir=~/runs of mine"]
    done = subprocess.run(command, env=os.environ | job, check=True, capture_output=True, text=True)
    assert done.stdout == f"kept {name}.py\n"


def test_the_restarts_are_the_jobs_own(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    answer(slurm, "scontrol", "JobId=7 Requeue=1 Restarts=0")
    assert batch_job._restarts("7") == 0
