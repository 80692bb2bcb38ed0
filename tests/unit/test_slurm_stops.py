"""Requests to stop a job on Slurm: when they come, whose they are, and what becomes of the job; Slurm's commands are
stand-ins."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.slurm import batch_job, ranks
from pipeline.slurm.batch_job import Job, accused_node, obey
from pipeline.slurm.rank_logs import Ended, code_of_job, ends_of_ranks
from pipeline.slurm.ranks import Ranks, Request
from pipeline.slurm.requeueing import LEAD_SECONDS, Decision, Life, decide, lead_seconds, seconds_to_wait
from tests.forked import ROOT

# A rank that starts slowly, loses a number of signals, and stops at the next one; or at a file STOP, without a word.
SRUN = """\
#!/bin/bash
for option; do [[ $option != --output=* ]] || out=${option#--output=}; done
out=${out/\\%5t/00000}
sleep 0.7
end() { echo "srun: error: n1: task 0: Exited with exit code 75" >&2; exit 75; }
trap '((LOST-- > 0)) || { echo "asked to stop by SIGUSR1" >>$out; sleep 0.5; end; }' USR1
echo loading >>$out
for ((looks = 0; looks < 2000; looks++)); do sleep 0.02; [[ ! -e $STOP ]] || end; done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of stand-ins for Slurm's commands, first in the path; signals are as before afterwards."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", "#!/bin/sh\necho JobId=7 PreemptTime=None\n")
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def stand_in(folder: Path, command: str, text: str) -> None:
    (folder / command).write_text(text)
    (folder / command).chmod(0o755)


def times(folder: Path, left: str, limit: str) -> None:
    stand_in(folder, "squeue", f'#!/bin/sh\ncase "$*" in *TimeLeft) echo {left} ;; *) echo {limit} ;; esac\n')


def started(folder: Path, request: Request, lost: int = 0) -> Ranks:
    environment = dict(os.environ) | {"LOST": str(lost), "STOP": str(folder / "STOP")}
    return Ranks("7", ["train"], environment, folder, request)


@pytest.mark.parametrize("name", ["train", "score"])
def test_a_signal_of_slurms_does_not_end_a_batch_script_that_starts(slurm: Path, name: str) -> None:
    """Slurm signals within seconds where the limit is shorter than the lead time, as in site.sh here and then in Python."""
    launch = slurm / "checkout" / "launch"
    launch.mkdir(parents=True)
    for file in (f"{name}.sbatch", f"{name}.py", "slurm_job.sh"):
        shutil.copy(ROOT / "launch" / file, launch)
    (launch / "site.sh").write_text("kill -USR1 $$\n")
    stand_in(slurm, "python3", "#!/bin/bash\nkill -USR1 $$\necho $*\n")
    job = {"SLURM_SUBMIT_DIR": str(launch.parent), "SLURM_JOB_ID": "7"}
    command = ["bash", launch / f"{name}.sbatch", "a.b=c"]
    done = subprocess.run(command, env=os.environ | job, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [f"-P -m pipeline.slurm.batch_job {name}.py a.b=c"])


def test_a_signal_that_was_ignored_while_the_script_started_counts_by_the_time_left(slurm: Path) -> None:
    times(slurm, "2:00", "10:00")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    found = started(slurm, Request(LEAD_SECONDS))
    found.wait()
    assert (found.code, found.asked_by_slurm) == (75, True)

    # Nothing can have been missed with an hour left, nor where the signal was never ignored.
    for left, handler in (("1:00:00", signal.SIG_IGN), ("2:00", signal.SIG_DFL)):
        times(slurm, left, "2:00:00")
        signal.signal(signal.SIGUSR1, handler)
        request = Request(LEAD_SECONDS)
        request.assume_missed("7")
        assert request.came_at is None


@pytest.mark.parametrize(("left", "is_slurms"), [("9:00", True), ("59:00", False)])
def test_a_request_before_there_are_ranks_reaches_them_when_they_can_hear_and_is_slurms_by_the_time_left(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: str, is_slurms: bool
) -> None:
    monkeypatch.setattr(ranks, "_SECONDS_BETWEEN_REQUESTS", 0.5)
    times(slurm, left, "1:00:00")
    request = Request(LEAD_SECONDS)
    os.kill(os.getpid(), signal.SIGUSR1)
    found = started(slurm, request, lost=1)
    found.wait()
    assert (found.code, found.asked_by_slurm) == (75, is_slurms)
    assert ("a person's request, since 3540 s are left and Slurm signals at 600 s" in capsys.readouterr().out) is not is_slurms


def test_a_stop_file_is_a_persons_where_the_script_has_been_signalled_and_waits(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times(slurm, "7:50", "8:00")
    request = Request(LEAD_SECONDS)
    os.kill(os.getpid(), signal.SIGUSR1)
    (slurm / "STOP").touch()
    found = started(slurm, request)
    found.wait()
    assert (found.code, found.asked_by_slurm) == (75, None)
    assert "the ranks are asked to stop in 350 s, when a quarter is left" in capsys.readouterr().out


def test_a_rank_that_a_request_ends_before_it_can_listen_is_neither_lost_nor_its_node_at_fault(tmp_path: Path) -> None:
    lines = ["srun: error: n1: task 0: User defined signal 1", "srun: error: n2: tasks 1-2: Terminated"]
    ends = ends_of_ranks(lines)
    assert ends == [Ended("n1", 0, 75), Ended("n2", 1, 75), Ended("n2", 2, 75)]
    job = Job("7", "7", 0, ["n1", "n2"], "train.py", [], tmp_path)
    code = code_of_job(ends, 128 + signal.SIGTERM)
    assert (code, accused_node(job, ends)) == (75, None)
    assert code_of_job([], 128 + signal.SIGUSR1) == 75, "srun itself, while it starts"

    # A person's request; one of Slurm's with nothing saved; and a preemption, after which more time is no help.
    assert decide(Life(code, False, ends), 0).why.startswith("it was asked to stop by a person")
    assert decide(Life(code, False, ends, asked_by_slurm=True), 0).why.startswith("it has saved nothing since it began")
    assert decide(Life(code, False, ends, asked_by_slurm=True, is_preempted=True), 0).requeue

    # Beside a rank that was killed, or that had an error, it is that one that counts.
    killed = [Ended("n3", 3, None), *ends]
    assert (code_of_job(killed, 143), accused_node(job, killed)) == (143, "n3")
    assert decide(Life(143, False, killed, accused="n3"), 0) == Decision(True, "a rank died or stood still", "n3")
    assert code_of_job([*ends, Ended("n3", 3, 2)], 143) == 2


@pytest.mark.parametrize(("preempted", "requeues"), [("None", False), ("2026-11-28T12:00:00", True)])
def test_a_life_whose_ranks_a_request_ended_while_they_started_is_recorded_as_stopped(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, preempted: str, requeues: bool
) -> None:
    times(slurm, "59:00", "1:00:00")
    stand_in(slurm, "srun", "#!/bin/sh\necho 'srun: error: n1: task 0: User defined signal 1' >&2\nexit 138\n")
    stand_in(slurm, "scontrol", f"#!/bin/sh\necho $* >>{slurm}/asked\necho JobId=7 Requeue=1 PreemptTime={preempted}\n")
    # The script hears a signal from its first moment on.
    monkeypatch.setattr(batch_job, "check_gpus", lambda environment: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr(batch_job, "add_to_environment", dict)
    job = Job("7", "7", 0, ["n1"], "train.py", [], slurm / "run")
    monkeypatch.setattr(batch_job, "find_job", lambda script, arguments: job)
    assert batch_job.main(["train.py"]) == 75
    life = json.loads(job.records.read_text())
    assert (life["requeue"], life["has_lost_a_rank"], life["accused"], life["exclude"]) == (requeues, False, None, None)
    assert ("requeue 7\n" in (slurm / "asked").read_text()) is requeues


def test_a_job_that_somebody_requeued_is_not_said_to_be_out_of_the_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decision = decide(Life(75, True, asked_by_slurm=False, cancelled=True), 0)
    obey(Job("7", "7", 0, ["n1"], "train.py", [], tmp_path), decision)
    said = "it was cancelled, somebody requeued it, or it is at its time limit"
    assert capsys.readouterr().out == f"slurm: not put into the queue again by this script: {said}\n"


def test_a_lead_time_of_the_users_own_is_read_from_slurms_variable() -> None:
    given = ["B:USR1@1800", "USR1@120", "RB:10@60", "B:USR1", ""]
    assert [lead_seconds({"SBATCH_SIGNAL": each}) for each in given] == [1800, 120, 60, LEAD_SECONDS, LEAD_SECONDS]
    assert lead_seconds({}) == LEAD_SECONDS


def test_ranks_that_start_long_after_the_signal_still_have_until_a_quarter_of_the_limit() -> None:
    assert seconds_to_wait(240, 600, signalled_before=360) == 90
    assert seconds_to_wait(100, 600, signalled_before=500) == 0
    assert seconds_to_wait(240, 600) == 0, "the lead time of a user"


def test_what_a_job_has_saved_is_seen_below_folders_of_any_name(tmp_path: Path) -> None:
    run_dir, output = tmp_path / "web.partial" / "run", tmp_path / "web.partial" / "losses"
    saved = [run_dir / "checkpoints/step-1/state.json", run_dir / "reference/a.json", output / "0.tar"]
    unfinished = [run_dir / "checkpoints/step-2.partial/state.json", output / "1.tar.partial", output / "x.partial" / "2.tar"]
    for file in (*saved, *unfinished):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert Job("7", "7", 0, ["n1"], "score.py", [f"--output={output}"], run_dir).saved() == set(saved)
