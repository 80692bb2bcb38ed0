"""Work on many cores: every result once, progress, and errors that reach the parent."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback

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


def where(number, report):
    time.sleep(0.1)  # so that one worker cannot do it all
    return os.getpid(), threading.get_native_id(), os.environ["TOKENIZERS_PARALLELISM"]


def answer_with_what_cannot_be_sent(number, report):
    return threading.Lock()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_task_is_done_once_and_counted(workers):
    reports = []
    results = list(work_on(square, range(20), workers, lambda *counts: reports.append(counts)))
    assert sorted(results) == [number * number for number in range(20)]
    assert [sum(column) for column in zip(*reports, strict=True)] == [20, 190, 200]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_error_in_a_task_is_the_parents_and_says_where(workers):
    with pytest.raises(DataError, match="three is bad") as caught:
        list(work_on(fail_at_three, range(20), workers, lambda *counts: None))
    where_to_look = "".join(traceback.format_exception(caught.value))
    assert 'raise DataError("three is bad")' in where_to_look
    assert ("In a worker process" in where_to_look) == (workers == 3)


@pytest.mark.parametrize(("workers", "num_processes"), [(2, 1), (4, 2), (5, 3)])
def test_workers_are_threads_two_to_a_process_and_never_the_first_one(workers, num_processes):
    places = set(work_on(where, range(6 * workers), workers, lambda *counts: None))
    assert len({thread for _, thread, _ in places}) == workers
    assert len({process for process, _, _ in places}) == num_processes
    assert {process for process, _, _ in places}.isdisjoint({os.getpid()}) == (num_processes > 1)
    assert all(process != thread for process, thread, _ in places)
    assert {parallelism for _, _, parallelism in places} == {"false"}


@pytest.mark.parametrize("before", [None, "true"])
def test_the_library_may_use_threads_again_afterwards(monkeypatch, before):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    list(work_on(square, range(3), 2, lambda *counts: None))
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_an_answer_that_cannot_be_sent_is_an_error_and_no_wait_for_ever():
    with pytest.raises(TypeError, match="cannot pickle"):
        list(work_on(answer_with_what_cannot_be_sent, range(6), 3, lambda *counts: None))


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"a worker process was killed.*fewer --processes"):
        list(work_on(die_at_three, range(20), 3, lambda *counts: None))


def test_workers_of_a_killed_parent_end_with_it(tmp_path):
    script = (
        "import sys; from pipeline.data.workers import work_on; from tests.unit.test_data_workers import sleep_beside_a_file\n"
        "if __name__ == '__main__':\n"
        "    list(work_on(sleep_beside_a_file, sys.argv[1:], 3, lambda *counts: None))"
    )
    (tmp_path / "parent.py").write_text(script)
    files = [tmp_path / name for name in "abc"]
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
