"""Work on many cores: results as they come, progress meanwhile, and no orphans.

Workers are threads, `_THREADS` to a process; up to so many are threads of this process. The tokenizers library lets Python go
on while it works, and threads share its tables and its memory of words. Of several workers none is a process's first thread:
that one allocates from the C library's main heap, between all that the process has ever made, and tokenising there was measured
to take up to 24 % more CPU time than in the heap of a thread, in other runs no more (Python's own library in documents of about
2,000 characters, on a shared x86 machine). More threads to a process would wait for each other in Python's part: reading
documents and handing over their ids. The price of threads of this process is that a kill for want of memory takes the whole
program; the same command goes on from there.

Processes are started afresh (`spawn`): a forked one would inherit the threads and locks of the tokenizers library. Each worker
counts what it has done in cells that no other writes, so there is no lock that a killed one could keep. A process whose parent
is gone, killed by a signal that nobody can catch, ends at once and so cannot write beside the next run.

The standard library's ProcessPoolExecutor was tried in place of the pipes, one worker to a process: 193 lines instead of 237,
but with four workers 15 % more CPU time on 22 MB (median of seven pairs, 2 to 37 %) and 10 and 44 % more on 68 MB (two
pairs), perhaps because threads of a process share the tokenizer's memory of words. In Python 3.11 a second Ctrl-C that breaks
off its shutdown left it waiting for its workers for ever.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.data.errors import DataError
from pipeline.processes import find

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]
"""Told of documents, tokens and bytes, each since the last call."""
_Worker = Callable[[Callable[[Any, Report], Any], Any], Any]
"""Calls a function with a task and its own way to report."""

SUSPENDED_SECONDS = 60.0
"""Time for which a worker may be suspended while the others are not."""

_THREADS = 2
_SECONDS_BETWEEN_LOOKS = 1.0
_POLL_SECONDS = 0.2
# Of the cells: the first tells all workers to stop, then come each one's documents, tokens and bytes.
_STOP, _COUNTS = 0, 3
_OF_TOKENIZERS = "TOKENIZERS_PARALLELISM"


class _StopError(Exception):
    pass


def work_on(
    function: Callable[[Task, Report], Result], tasks: Iterable[Task], workers: int, report: Report
) -> Iterator[Result]:
    """Yield `function(task, report)` for every task, in the order in which they are done.

    With one worker all is done in this thread, and the tokenizers library may use threads of its own.

    Raises:
        DataError: what the function raised, or a process was killed.
    """
    # One worker is this thread.
    if workers == 1:
        for task in tasks:
            yield function(task, report)
        return

    # More are threads, of this process or of others; none is left when the results are no longer wanted.
    with _workers_here(workers) if workers <= _THREADS else _workers_in_processes(workers) as (idle, cells):
        executor = ThreadPoolExecutor(workers)
        try:
            yield from _results(executor, partial(_run, idle, function), iter(tasks), workers, _Changes(cells, report))
        finally:
            cells[_STOP] = 1
            executor.shutdown(cancel_futures=True)


def _results(
    executor: ThreadPoolExecutor, run: Callable[[Task], Result], tasks: Iterator[Task], workers: int, changes: "_Changes"
) -> Iterator[Result]:
    # Some in hand, so that no worker waits; not all, of which there may be many.
    running = {executor.submit(run, task) for task in islice(tasks, 3 * workers)}
    while running:
        done, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        changes.report()
        for future in done:
            yield future.result()
        running |= {executor.submit(run, task) for task in islice(tasks, len(done))}


class _Changes:
    """Passes on what all workers' counts have grown by."""

    def __init__(self, cells: Any, report: Report) -> None:
        self._cells = cells
        self._report = report
        self._last = [0] * _COUNTS

    def report(self) -> None:
        now = [sum(self._cells[count::_COUNTS]) for count in range(1, 1 + _COUNTS)]
        self._report(*(new - old for new, old in zip(now, self._last, strict=True)))
        self._last = now


def _run(idle: "SimpleQueue[_Worker]", function: Callable[[Task, Report], Result], task: Task) -> Result:
    worker = idle.get()
    try:
        return worker(function, task)
    finally:
        idle.put(worker)


@contextmanager
def _workers_here(workers: int) -> Iterator[tuple["SimpleQueue[_Worker]", Any]]:
    """Threads of this process; meanwhile the tokenizers library uses none of its own."""
    before = os.environ.get(_OF_TOKENIZERS)
    os.environ[_OF_TOKENIZERS] = "false"
    cells = [0] * (1 + workers * _COUNTS)
    try:
        yield _queue(partial(_call, partial(_add, cells, worker)) for worker in range(workers)), cells
    finally:
        if before is None:
            del os.environ[_OF_TOKENIZERS]
        else:
            os.environ[_OF_TOKENIZERS] = before


@contextmanager
def _workers_in_processes(workers: int) -> Iterator[tuple["SimpleQueue[_Worker]", Any]]:
    """Threads of other processes, each at the other end of a pipe."""
    context = multiprocessing.get_context("spawn")
    cells = context.RawArray("q", 1 + workers * _COUNTS)
    connections: list[Connection] = []
    processes: list[SpawnProcess] = []

    def start() -> None:
        # Ctrl-C reaches all processes of a terminal, and the parent says what happens: what a thread that blocks it starts is
        # deaf to it from the first moment. The tracker, which comes with the first process, would unblock it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for first in range(0, workers, _THREADS):
            theirs = []
            for worker in range(first, min(first + _THREADS, workers)):
                ours, other = context.Pipe()
                connections.append(ours)
                theirs.append((other, partial(_add, cells, worker)))
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            processes.append(process)
            # Only where nobody else has the other end is a process that is gone seen to be gone.
            for other, _ in theirs:
                other.close()

    over = threading.Event()
    threading.Thread(target=_kill_suspended, args=(processes, over), daemon=True).start()
    try:
        # KeyboardInterrupt is raised in the first thread, whichever the signal came to: so it does not break off a start.
        with ThreadPoolExecutor(1) as starter:
            starter.submit(start).result()
        yield _queue(partial(_ask, connection) for connection in connections), cells
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()
        over.set()


def _kill_suspended(workers: Sequence[SpawnProcess], over: threading.Event) -> None:
    """Thread: kill a worker that was suspended for long by itself; it would be waited for without end.

    Time in which all are suspended together does not count, because this thread is then as well.
    """
    seen_suspended: Counter[int] = Counter()
    while not over.wait(_SECONDS_BETWEEN_LOOKS):
        for process in map(find, [worker.pid for worker in workers if worker.pid is not None]):
            seen_suspended[process.pid] = seen_suspended[process.pid] + 1 if process.is_stopped else 0
            if seen_suspended[process.pid] * _SECONDS_BETWEEN_LOOKS >= SUSPENDED_SECONDS:
                process.kill()


def _queue(workers: Iterable[_Worker]) -> "SimpleQueue[_Worker]":
    queue: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        queue.put(worker)
    return queue


def _call(report: Report, function: Callable[[Task, Report], Result], task: Task) -> Result:
    return function(task, report)


def _ask(connection: Connection, function: Callable[[Task, Report], Result], task: Task) -> Result:
    try:
        connection.send((function, task))
        result, error = connection.recv()
    except (EOFError, OSError):
        raise DataError(
            f"a worker process was killed, perhaps for want of memory, or was suspended for {SUSPENDED_SECONDS:g} s; run the "
            "same command again to continue where it stopped, with fewer --processes"
        ) from None
    if error is not None:
        raise error
    return result


def _serve(workers: Sequence[tuple[Connection, Report]]) -> None:
    # All cores have a thread already.
    os.environ[_OF_TOKENIZERS] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threads = [threading.Thread(target=_answer, args=worker) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(connection: Connection, report: Report) -> None:
    """Do what is asked until nobody can ask, or be told, any more."""
    with connection, suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_outcome(connection.recv_bytes(), report))


def _outcome(asked: bytes, report: Report) -> bytes:
    """Do what is asked, and return (result, None) or (None, error) as the parent will read it."""
    try:
        function, task = pickle.loads(asked)
        return pickle.dumps((function(task, report), None))
    except BaseException as error:
        sent = error if _can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}")
        sent.add_note(f"In a worker process:\n{traceback.format_exc()}")
        return pickle.dumps((None, sent))


def _can_be_sent(error: BaseException) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error's own way to be made again may raise anything
        return False
    return True


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _add(cells: Any, worker: int, *counts: int) -> None:
    if cells[_STOP]:
        raise _StopError
    for cell, count in enumerate(counts, start=1 + worker * _COUNTS):
        cells[cell] += count
