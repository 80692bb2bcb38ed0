"""Locks on files: who holds one, who is kept out, and what ends it."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.runtime.run_lock import RunLock
from pipeline.storage.locks import take_lock, take_lock_of_process

TAKE = """
import sys
from pipeline.storage import locks
print(getattr(locks, sys.argv[1])(open(sys.argv[2], "ab")))
"""


def taken_by_another(name: str, path: os.PathLike) -> bool:
    """Return whether a process of its own gets the lock."""
    done = subprocess.run([sys.executable, "-c", TAKE, name, str(path)], capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


@pytest.mark.parametrize("take", [take_lock, take_lock_of_process])
def test_a_lock_keeps_other_processes_out_until_its_file_is_closed(tmp_path, take):
    with open(tmp_path / "lock", "ab") as file:
        assert take(file)
        assert not taken_by_another(take.__name__, tmp_path / "lock")
    assert taken_by_another(take.__name__, tmp_path / "lock")


def test_a_lock_keeps_out_this_process_too_but_for_the_open_file_that_has_it(tmp_path):
    with open(tmp_path / "lock", "ab") as file, open(tmp_path / "lock", "ab") as other:
        assert take_lock(file)
        assert take_lock(file)
        assert not take_lock(other)


def test_who_waits_for_a_lock_has_it_when_the_other_is_done(tmp_path):
    with open(tmp_path / "lock", "ab") as other:
        with open(tmp_path / "lock", "ab") as file:
            assert take_lock(file)
            waiting = threading.Thread(target=take_lock, args=(other,), kwargs={"wait": 100.0}, daemon=True)
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
        waiting.join(60)
        assert not waiting.is_alive()
        with open(tmp_path / "lock", "ab") as file:
            assert not take_lock(file)


def test_nobody_waits_for_a_lock_without_end(tmp_path):
    with open(tmp_path / "lock", "ab") as file, open(tmp_path / "lock", "ab") as other:
        assert take_lock(file)
        started = time.monotonic()
        assert not take_lock(other, wait=0.5)
        assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize(("take", "is_free"), [(take_lock, False), (take_lock_of_process, True)])
def test_a_child_that_inherits_the_file_holds_its_lock_unless_that_is_its_parents_alone(tmp_path, take, is_free):
    with open(tmp_path / "lock", "ab") as file:
        assert take(file)
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[file.fileno()])
    with child:
        assert taken_by_another(take.__name__, tmp_path / "lock") == is_free
        child.communicate()
    assert taken_by_another(take.__name__, tmp_path / "lock")


@pytest.mark.parametrize(("take", "mechanism"), [(take_lock, "flock"), (take_lock_of_process, "lockf")])
def test_where_a_file_system_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch, take, mechanism):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, mechanism, no_locks)
    with open(tmp_path / "lock", "ab") as file, open(tmp_path / "lock", "ab") as other:
        assert take(file)
        assert take(other)


HOLD = """
import sys
from pathlib import Path
from pipeline.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


def test_who_has_a_run_directory_is_named_to_the_next_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "None\n"
        lock = RunLock(tmp_path / "run")
        assert f"process {holder.pid} on " in (lock.take() or "")
        lock.release()
        holder.kill()
    assert lock.take() is None
    lock.release()
