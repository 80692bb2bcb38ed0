"""Work on many processes: every result once, progress, and errors that reach the parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.data.manifest import DataError
from pipeline.data.workers import work_on


def square(number, report):
    report(1, number, 10)
    return number * number


def fail_at_three(number, report):
    if number == 3:
        raise DataError("three is bad")
    return number


def die_at_three(number, report):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_beside_a_file(path, report):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("processes", [1, 3])
def test_every_task_is_done_once_and_counted(processes):
    reports = []
    results = list(work_on(square, range(20), processes, lambda *counts: reports.append(counts)))
    assert sorted(results) == [number * number for number in range(20)]
    assert [sum(column) for column in zip(*reports, strict=True)] == [20, 190, 200]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_task_is_the_parents(processes):
    with pytest.raises(DataError, match="three is bad"):
        list(work_on(fail_at_three, range(20), processes, lambda *counts: None))


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"a worker process was killed.*fewer --processes"):
        list(work_on(die_at_three, range(20), 2, lambda *counts: None))


def test_workers_of_a_killed_parent_end_with_it(tmp_path):
    script = (
        "import sys; from pipeline.data.workers import work_on; from tests.unit.test_data_workers import sleep_beside_a_file\n"
        "if __name__ == '__main__':\n"
        "    list(work_on(sleep_beside_a_file, sys.argv[1:], 2, lambda *counts: None))"
    )
    (tmp_path / "parent.py").write_text(script)
    files = [tmp_path / "a", tmp_path / "b"]
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), *map(str, files)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    until(lambda: all(file.exists() and file.read_text() for file in files))
    workers = [int(file.read_text()) for file in files]
    assert all(is_alive(worker) for worker in workers)
    parent.kill()
    parent.wait()
    until(lambda: not any(is_alive(worker) for worker in workers))


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true within a minute")


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
