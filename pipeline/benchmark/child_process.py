"""A process that works for this one and answers over a pipe, and whose end is noticed at once.

Only the child holds the other end of its pipe, so a child that is killed or calls `os._exit` closes it: whoever waits for its
answer hears of it then, with the exit code, and waits for no timeout. A child whose parent is gone ends too.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

_DUMP_SIGNAL = signal.SIGUSR2
_SECONDS_TO_DUMP = 1.0


class ChildDiedError(RuntimeError):
    """A child process ended without an answer."""


class Child:
    """A process of its own that runs `work(child_end, *arguments)`; use as a context manager.

    `work` lives at the top of a module. It sends its answers with `answer`. The process starts with Python's usual signal
    handlers, also where this one was started with `nohup ... &`, which has every later process ignore SIGINT.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, child_end = context.Pipe()
        self._stacks = tempfile.NamedTemporaryFile()  # noqa: SIM115 closed by __exit__
        self._process = context.Process(target=_run_child, args=(self._stacks.name, work, child_end, arguments))
        self._process.start()
        child_end.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the process: by itself, or by force where there was an error or it takes more than 30 seconds."""
        if kind is None:
            self._process.join(timeout=30)
        self._process.kill()
        self._process.join()
        self.connection.close()
        self._stacks.close()

    def receive(self) -> Any:
        """Wait for the next answer.

        Raises:
            ChildDiedError: the process ended without one.
        """
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise ChildDiedError(f"{self.name} died without an answer: {self.ending()}") from None

    def ending(self) -> str:
        """Wait for the process to end, and describe its exit code."""
        self._process.join()
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name} (exit code {code})"
        return f"exit code {code}"

    def request_stacks(self) -> None:
        """Have the process write the stacks of its threads, for `read_stacks`."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, _DUMP_SIGNAL)

    def read_stacks(self) -> str:
        """Return the stacks of the process's threads; empty if it was still starting."""
        with open(self._stacks.name, encoding="utf-8", errors="replace") as file:
            return file.read()


def stacks_of(children: Sequence[Child]) -> str:
    """Return where the threads of these processes are, under the name of each process."""
    for child in children:
        child.request_stacks()
    time.sleep(_SECONDS_TO_DUMP)
    return "\n".join(f"{child.name}:\n{child.read_stacks() or 'it was still starting'}" for child in children)


def answer(child_end: Connection, value: Any) -> None:
    """Send an answer to the parent."""
    # As bytes: a tensor sent as it is would live in shared memory that ends with this process.
    child_end.send_bytes(pickle.dumps(value))


def _run_child(stacks: str, work: Callable[..., None], child_end: Connection, arguments: Sequence[Any]) -> None:
    # Python leaves SIGINT ignored where it was inherited so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # The file stays open for as long as the handler may write to it: for good.
    faulthandler.register(_DUMP_SIGNAL, open(stacks, "w"), all_threads=True)  # noqa: SIM115

    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(child_end, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
