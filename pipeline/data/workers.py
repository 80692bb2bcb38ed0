"""Work on many cores: results as they come, progress meanwhile, and no orphans.

Workers are threads, `_THREADS` to a process; up to so many are threads of this process. The tokenizers library lets Python go
on while it works, and threads share its tables and its memory of words. Never a process's first thread, for it: that one
allocates from the C library's main heap, between all that the process has ever made, and there the same tokenising was measured
to take a fifth longer than in the heap of a thread. More threads to a process would wait for each other in what is Python's
part: reading documents and handing over their ids.

Processes are started afresh (`spawn`): a forked one would inherit the threads and locks of the tokenizers library. Workers add
what they have done to counters in shared memory. A process whose parent is gone, killed by a signal that nobody can catch, ends
at once and so cannot write beside the next run.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.data.manifest import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]
"""Told of documents, tokens and bytes, each since the last call."""
_Worker = Callable[[Callable[[Any, Report], Any], Any], Any]
"""Calls a function with a task and its own way to report."""

_THREADS = 2
_POLL_SECONDS = 0.2
_DOCUMENTS, _TOKENS, _BYTES, _STOP = range(4)
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
    if workers == 1:
        for task in tasks:
            yield function(task, report)
        return
    counters = multiprocessing.get_context("spawn").Array("q", 4)
    with _workers_here(workers, counters) if workers <= _THREADS else _workers_in_processes(workers, counters) as idle:
        executor = ThreadPoolExecutor(workers)
        try:
            yield from _results(executor, partial(_run, idle, function), iter(tasks), workers, _Changes(counters, report))
        finally:
            counters[_STOP] = 1
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
    """Passes on what the shared counters have grown by."""

    def __init__(self, counters: Any, report: Report) -> None:
        self._counters = counters
        self._report = report
        self._last = (0, 0, 0)

    def report(self) -> None:
        now = tuple(self._counters[:_STOP])
        self._report(*(new - old for new, old in zip(now, self._last, strict=True)))
        self._last = now


def _run(idle: "SimpleQueue[_Worker]", function: Callable[[Task, Report], Result], task: Task) -> Result:
    worker = idle.get()
    try:
        return worker(function, task)
    finally:
        idle.put(worker)


@contextmanager
def _workers_here(workers: int, counters: Any) -> Iterator["SimpleQueue[_Worker]"]:
    """Threads of this process; meanwhile the tokenizers library uses none of its own."""
    before = os.environ.get(_OF_TOKENIZERS)
    os.environ[_OF_TOKENIZERS] = "false"
    add = partial(_add, counters)
    try:
        yield _queue([lambda function, task: function(task, add)] * workers)
    finally:
        if before is None:
            del os.environ[_OF_TOKENIZERS]
        else:
            os.environ[_OF_TOKENIZERS] = before


@contextmanager
def _workers_in_processes(workers: int, counters: Any) -> Iterator["SimpleQueue[_Worker]"]:
    """Threads of other processes, each at the other end of a pipe."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = []
    for first in range(0, workers, _THREADS):
        theirs = [other for _, other in pipes[first : first + _THREADS]]
        processes.append(context.Process(target=_serve, args=(theirs, counters), daemon=True))
        processes[-1].start()
        # Only where nobody else has the other end is a process that is gone seen to be gone.
        for connection in theirs:
            connection.close()
    try:
        yield _queue([partial(_ask, connection) for connection, _ in pipes])
    finally:
        for connection, _ in pipes:
            connection.close()
        for process in processes:
            process.join()


def _queue(workers: Iterable[_Worker]) -> "SimpleQueue[_Worker]":
    queue: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        queue.put(worker)
    return queue


def _ask(connection: Connection, function: Callable[[Task, Report], Result], task: Task) -> Result:
    try:
        connection.send((function, task))
        result, error = connection.recv()
    except (EOFError, OSError):
        raise DataError(
            "a worker process was killed, perhaps for want of memory; run the same command again to continue where it "
            "stopped, with fewer --processes"
        ) from None
    if error is not None:
        raise error
    return result


def _serve(connections: Sequence[Connection], counters: Any) -> None:
    # All cores have a thread already.
    os.environ[_OF_TOKENIZERS] = "false"
    # Ctrl-C reaches all processes of a terminal; the parent says what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threads = [threading.Thread(target=_answer, args=(connection, partial(_add, counters))) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(connection: Connection, report: Report) -> None:
    """Do what is asked until nobody can ask any more."""
    with connection:
        while True:
            try:
                function, task = connection.recv()
            except EOFError:
                return
            try:
                connection.send((function(task, report), None))
            except Exception as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                connection.send((None, error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _add(counters: Any, documents: int, tokens: int, size: int) -> None:
    with counters.get_lock():
        if counters[_STOP]:
            raise _StopError
        counters[_DOCUMENTS] += documents
        counters[_TOKENS] += tokens
        counters[_BYTES] += size
