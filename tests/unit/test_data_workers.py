"""Work on many cores: every result once, progress, and errors that reach the parent."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest

from pipeline.data.corpus.workers import work_on
from pipeline.data.errors import DataError

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def square(number, report):
    report(1, number, 10)
    return number * number


def report_for_a_second(number, report):
    times, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        report(1, 2, 3)
        times += 1
    return times


def fail_at_three(number, report):
    if number == 3:
        raise DataError("three is bad")
    return number


def die_at_three(number, report):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def suspend_itself_at_three(number, report):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return number


def report_without_rest_until_killed(number, report):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        report(0, 0, 1)


def sleep_beside_a_file(path, report):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def where(number, report):
    time.sleep(0.1)  # so that one worker cannot do it all
    return os.getpid(), threading.get_native_id(), os.environ["TOKENIZERS_PARALLELISM"]


def tick(task, report):
    """Number 0 is done at once; the others go on for half a minute."""
    directory, number = task
    (directory / str(number)).touch()
    for _ in range(300 if number else 0):
        report(0, 0, 1)
        time.sleep(0.1)
    return number


def sleep(seconds, report):
    time.sleep(seconds)


class UnsendableError(Exception):
    def __reduce__(self):
        raise TypeError("a lock, say")


class UnreadableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class DeepError(BaseException):
    pass


def fail(kind, report):
    raise {"unsendable": UnsendableError("odd"), "unreadable": UnreadableError("odd", "one"), "deep": DeepError("odd")}[kind]


class UnreadableTask:
    def __reduce__(self):
        return int, ("no number",)


def answer_with_what_cannot_be_sent(number, report):
    return threading.Lock()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_task_is_done_once_and_counted(workers):
    reports = []
    results = list(work_on(square, range(20), workers, lambda *counts: reports.append(counts)))
    assert sorted(results) == [number * number for number in range(20)]
    assert [sum(column) for column in zip(*reports, strict=True)] == [20, 190, 200]


def test_workers_that_report_at_once_lose_nothing_of_each_other():
    reports = []
    times = sum(work_on(report_for_a_second, range(3), 3, lambda *counts: reports.append(counts)))
    assert [sum(column) for column in zip(*reports, strict=True)] == [times, 2 * times, 3 * times]


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


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("unsendable", RuntimeError, "UnsendableError: odd"),
        ("unreadable", RuntimeError, "UnreadableError: odd one"),
        ("deep", DeepError, "odd"),
    ],
)
def test_an_error_that_cannot_be_sent_or_is_no_exception_arrives_under_its_own_name(kind, raised, message):
    with pytest.raises(raised) as caught:
        list(work_on(fail, [kind], 3, lambda *counts: None))
    assert str(caught.value) == message
    assert "in fail\n" in caught.value.__notes__[0]


def test_a_task_that_cannot_be_read_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="no number"):
        list(work_on(square, [UnreadableTask()], 3, lambda *counts: None))


@pytest.mark.parametrize("workers", [2, 3])
def test_whoever_wants_no_more_results_waits_for_no_task_to_its_end(tmp_path, workers):
    tasks = [(tmp_path, number) for number in range(3 * workers)]
    results = work_on(tick, tasks, workers, lambda *counts: None)
    assert next(results) == 0
    until(lambda: len(list(tmp_path.iterdir())) > workers)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10
    assert len(list(tmp_path.iterdir())) < len(tasks)


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_as_they_are_needed(workers):
    taken = []
    tasks = (taken.append(number) or number for number in range(1000))
    results = work_on(square, tasks, workers, lambda *counts: None)
    next(results)
    assert len(taken) < 10
    assert len(list(results)) == 999


INTERRUPTED_TWICE = """
import os, signal, sys, threading, time
from pipeline.data.corpus.workers import work_on
from tests.unit.test_data_workers import sleep

def interrupt():
    for _ in range(2):
        time.sleep(0.5)
        os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    results = work_on(sleep, [0, 1.5, 1.5, 1.5], 3, lambda *counts: None)
    next(results)
    threading.Thread(target=interrupt).start()
    try:
        list(results)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
"""


def test_workers_of_an_impatient_parent_end_without_a_word(tmp_path):
    """At the second Ctrl-C it hears no answer, and asks no more."""
    (tmp_path / "parent.py").write_text(INTERRUPTED_TWICE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert (done.returncode, done.stderr) == (0, "interrupted\n")


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"a worker process was killed.*fewer --processes"):
        list(work_on(die_at_three, range(20), 3, lambda *counts: None))


def test_a_worker_that_stays_suspended_is_ended_and_said(monkeypatch):
    monkeypatch.setattr("pipeline.data.corpus.workers.SUSPENDED_SECONDS", 2.0)
    with pytest.raises(DataError, match=r"was suspended for 2 s; run the same command again"):
        list(work_on(suspend_itself_at_three, range(20), 3, lambda *counts: None))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("again", range(3))
def test_no_worker_can_be_killed_at_a_moment_for_which_the_others_wait_for_ever(again):
    with pytest.raises(DataError, match="a worker process was killed"):
        list(work_on(report_without_rest_until_killed, range(3), 3, lambda *counts: None))


TWO_WORKERS = """
from pathlib import Path
from pipeline.data.corpus.workers import work_on
from tests.unit.test_data_workers import square

assert sorted(work_on(square, range(9), 2, lambda *counts: None))[-1] == 64
print([children for task in Path("/proc/self/task").iterdir() if (children := (task / "children").read_text())])
"""


def test_two_workers_start_no_process_at_all():
    done = subprocess.run([sys.executable, "-c", TWO_WORKERS], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


FEW_FILES = """
import os, resource
from multiprocessing import resource_tracker
from pipeline.data.corpus.workers import work_on
from tests.unit.test_data_workers import square

resource_tracker.ensure_running()
used, (_, hard) = len(os.listdir("/proc/self/fd")) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)
for spare in range(8):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    try:
        list(work_on(square, range(9), 3, lambda *counts: None))
    except OSError as error:
        print(error.strerror)
"""


def test_a_worker_that_cannot_be_started_is_the_systems_error():
    done = subprocess.run([sys.executable, "-c", FEW_FILES], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("Too many open files\n" * 8, "")


def test_workers_of_a_killed_parent_end_with_it(tmp_path):
    script = (
        "import sys; from pipeline.data.corpus.workers import work_on\n"
        "from tests.unit.test_data_workers import sleep_beside_a_file\n"
        "if __name__ == '__main__':\n"
        "    list(work_on(sleep_beside_a_file, sys.argv[1:], 3, lambda *counts: None))"
    )
    (tmp_path / "parent.py").write_text(script)
    files = [tmp_path / name for name in "abc"]
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), *map(str, files)],
        env=ENVIRONMENT,
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
