"""Which processes a rank takes for its launcher, and what makes one of this machine's processes that very one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import processes
from pipeline.runtime.launcher import _is_launcher, launcher_chain

ROOT = Path(__file__).resolve().parents[2]
CHAIN = (
    "import json, os; from pipeline import processes; from pipeline.runtime import launcher\n"
    "print(json.dumps([each.command for each in launcher.launcher_chain(processes.find(os.getpid()))]))"
)
START = "import subprocess, sys; subprocess.run({command!r}, check=True)"

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


def started_by(folder: Path, *names: str) -> list[str]:
    """What a rank remembers that is started by scripts of these names, the first by a test; the programs' names."""
    command = [sys.executable, "-c", CHAIN]
    for name in reversed(names):
        script = folder / name
        script.write_text(START.format(command=command))
        command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return [Path(command[1]).name for command in json.loads(done.stdout)]


def test_a_rank_remembers_all_up_to_its_launcher_and_nothing_above(tmp_path: Path) -> None:
    assert started_by(tmp_path, "shell", "torchrun") == ["torchrun"]
    # A script between them, as `torchrun --no-python script` has it.
    assert started_by(tmp_path, "shell", "torchrun", "between") == ["between", "torchrun"]
    assert started_by(tmp_path, "shell", "deepspeed", "torchrun") == ["torchrun", "deepspeed"]


def test_what_no_launcher_started_may_outlive_its_shell(tmp_path: Path) -> None:
    assert started_by(tmp_path, "shell") == []
    assert launcher_chain(processes.find(os.getpid())) == []


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        (["slurmstepd: [4711.0]"], True),
        (["/usr/sbin/slurmstepd: [4711.0]"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/venv/bin/python3", "/venv/bin/deepspeed", "--num_gpus", "8", "launch/train.py"], True),
        (["python3", "-m", "torch.distributed.run", "--nproc-per-node", "2"], True),
        (["bash", "-c", "deepspeed launch/train.py"], False),
        (["python", "launch/train.py", "--deepspeed", "ds_configs/zero3.json"], False),
        (["sshd: user@pts/0"], False),
        ([], False),
    ],
)
def test_launchers_are_told_by_their_command_lines(command: list[str], is_one: bool) -> None:
    assert _is_launcher(command) is is_one


def test_a_process_is_known_by_its_start_too_and_a_dead_one_is_dead_before_it_is_asked_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    found = processes.find(child.pid)
    assert found.is_alive
    assert found.parent == processes.find(os.getpid())
    # A process that has just begun may have none yet.
    ends = time.monotonic() + 300
    while not found.command:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert found.command[-1] == "import time; time.sleep(100)"

    # Another process of the same number is not it, and is left alone.
    other = processes.Process(child.pid, found.started + 1)
    assert not other.is_alive
    other.kill()
    os.kill(child.pid, signal.SIGSTOP)
    ends = time.monotonic() + 300
    while not found.is_stopped:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert found.is_alive

    found.kill()
    ends = time.monotonic() + 300
    while found.is_alive:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert child.wait() == -signal.SIGKILL


SUSPENDED_WORKER = """
import multiprocessing, os, signal
from pipeline.command_line import end_process

def suspend():
    os.kill(os.getpid(), signal.SIGSTOP)

if __name__ == "__main__":
    worker = multiprocessing.get_context("fork").Process(target=suspend, daemon=True)
    worker.start()
    print(os.waitpid(worker.pid, os.WUNTRACED)[0], flush=True)
    end_process({code})
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_that_ends_neither_waits_for_a_suspended_worker_nor_leaves_it_behind(code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUSPENDED_WORKER.format(code=code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    ends = time.monotonic() + 300
    while processes.find(int(done.stdout)).started:
        assert time.monotonic() < ends
        time.sleep(0.01)


ABORTS_AT_ITS_END = """
import atexit, os, threading, time
from concurrent.futures import ThreadPoolExecutor
from pipeline.command_line import end_process

class Abort:
    def __del__(self):
        os.abort()

def write():
    time.sleep(0.2)
    print("written", flush=True)

if __name__ == "__main__":
    kept = Abort()
    atexit.register(print, "closed")
    threading.Thread(target=write).start()
    executor = ThreadPoolExecutor(1)
    executor.submit(time.sleep, 0)
    end_process(0)
"""


def test_a_process_that_has_done_its_work_is_not_aborted_while_it_shuts_down() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABORTS_AT_ITS_END],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, "written\nclosed\n"), done.stderr


def test_of_a_process_that_cannot_be_looked_at_nothing_is_concluded() -> None:
    unknown = processes.find(2**22 + 1)
    assert unknown.started == 0
    assert unknown.is_alive
    unknown.kill()
