"""Work on many processes: results as they come, progress meanwhile, and no orphans.

Workers are started afresh (`spawn`): a forked one would inherit the threads and locks of the tokenizers library. They add what
they have done to counters in shared memory. A worker whose parent is gone, killed by a signal that nobody can catch, ends at
once and so cannot write beside the next run.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from pipeline.data.manifest import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]
"""Told of documents, tokens and bytes, each since the last call."""

_POLL_SECONDS = 0.2
_DOCUMENTS, _TOKENS, _BYTES, _STOP = range(4)

_counters: Any = None


class _StopError(Exception):
    pass


def work_on(
    function: Callable[[Task, Report], Result], tasks: Iterable[Task], processes: int, report: Report
) -> Iterator[Result]:
    """Yield `function(task, report)` for every task, in the order in which they are done; with one process, in this one.

    Raises:
        DataError: what the function raised, or a worker was killed.
    """
    if processes == 1:
        for task in tasks:
            yield function(task, report)
        return
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 4)
    executor = ProcessPoolExecutor(processes, context, _initialize, (counters,))
    try:
        yield from _results(executor, function, iter(tasks), processes, _Changes(counters, report))
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; run the same command again to continue where it "
            "stopped, with fewer --processes"
        ) from None
    finally:
        counters[_STOP] = 1
        executor.shutdown(cancel_futures=True)


def _results(
    executor: ProcessPoolExecutor,
    function: Callable[[Task, Report], Result],
    tasks: Iterator[Task],
    processes: int,
    changes: "_Changes",
) -> Iterator[Result]:
    # Some in hand, so that no worker waits; not all, of which there may be many.
    running = {executor.submit(_run, function, task) for task in islice(tasks, 3 * processes)}
    while running:
        done, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        changes.report()
        for future in done:
            yield future.result()
        running |= {executor.submit(_run, function, task) for task in islice(tasks, len(done))}


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


def _initialize(counters: Any) -> None:
    global _counters
    _counters = counters
    # All cores have a process already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of a terminal; the parent says what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _run(function: Callable[[Task, Report], Result], task: Task) -> Result:
    return function(task, _add)


def _add(documents: int, tokens: int, size: int) -> None:
    with _counters.get_lock():
        if _counters[_STOP]:
            raise _StopError
        _counters[_DOCUMENTS] += documents
        _counters[_TOKENS] += tokens
        _counters[_BYTES] += size
