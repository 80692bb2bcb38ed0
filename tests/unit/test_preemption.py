"""Signals while a job starts, of real processes: the first, a second, and one that meets a library that takes no notice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import hashlib, os, signal, time
from pipeline.runtime.preemption import StopRequest, interrupt_once
interrupt_once()
stop = StopRequest()
stop.end_at_once()
"""
# Out of which Python's handlers come only at the end, as out of a meeting of ranks.
IN_A_LIBRARY = "print('ready', flush=True); hashlib.pbkdf2_hmac('sha512', b'', b'', 500_000_000)\n"


def signalled(script: str, *numbers: int) -> tuple[int, str]:
    """(exit code, standard error) of a script that gets these signals once it has printed a line, each after the next line."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", BEGIN + script], env=environment, **piped) as process:  # type: ignore[call-overload]
        for number in numbers:
            assert process.stdout.readline(), process.stderr.read()
            # What comes after the line has begun.
            time.sleep(1)
            process.send_signal(number)
        process.wait(600)
        return process.returncode, process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_job_at_once_that_has_begun_nothing_even_within_a_library(number: int) -> None:
    exit_code, said = signalled(IN_A_LIBRARY, number)
    assert exit_code == 75
    assert said == "stopped on request before anything was begun; run the same command again\n"


def test_ctrl_c_ends_a_job_that_waits_in_a_library() -> None:
    assert signalled(IN_A_LIBRARY, signal.SIGINT) == (130, "interrupted\n")


def test_later_signals_are_requests_however_many_come() -> None:
    script = """
stop.wait_for_agreement()
assert not stop.is_requested
print("ready", flush=True)
while not stop.is_signalled: time.sleep(0.01)
print("again", flush=True)
time.sleep(3)
raise SystemExit(3 if stop.is_requested and not stop.is_overdue else 1)
"""
    assert signalled(script, signal.SIGUSR1, signal.SIGTERM) == (3, "")


def test_a_faster_rank_leaves_it_to_the_first_to_say_why_the_job_does_not_start() -> None:
    # A launcher ends all ranks once one has ended; the first would have said nothing yet.
    waiting = "print('ready', flush=True); print(stop.wait_for_the_first())"
    assert signalled(f"stop._says = False; {waiting}", signal.SIGTERM) == (75, "")

    script = """
import runpy, sys
from pipeline.runtime import preemption
preemption.SECONDS_FOR_THE_FIRST = 0.1
assert stop.wait_for_the_first() and (stop.wait_for_agreement() or not stop.wait_for_the_first())
sys.argv = ["train.py", "--print-config", "training.steps=0"]
print("ready", flush=True)
runpy.run_path("launch/train.py", run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "ready\n")
    assert "training.steps: got 0" in done.stderr


def test_a_second_ctrl_c_ends_what_the_first_one_only_began_to_end() -> None:
    script = """
stop.wait_for_agreement()
try:
    print("ready", flush=True)
    time.sleep(100)
except KeyboardInterrupt:
    print("ending", flush=True)
    time.sleep(100)
"""
    assert signalled(script, signal.SIGINT, signal.SIGINT) == (130, "")
