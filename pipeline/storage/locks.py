"""Locks on files, by the operating system: held until the file is closed, and by no process that was killed.

They reach as far as the file system carries locks. Where it carries none nobody is kept out: whoever asks gets the lock.
"""

import fcntl
from collections.abc import Callable
from typing import IO

File = int | IO[str] | IO[bytes]
"""An open file, or its descriptor; open to be written to."""


def take_lock(file: File, *, wait: bool = False) -> bool:
    """Lock an open file; False if another one, of this process or another, holds the lock (never with `wait`).

    A process that is forked meanwhile inherits the open file, and the lock lasts until it has closed it too.
    """
    return _take(fcntl.flock, file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_lock_of_process(file: File) -> bool:
    """Lock a file for this process alone, not for those that it forks; False if another process holds the lock.

    Whatever else of this process has the file open shares the lock, and gives it up by closing it.
    """
    return _take(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take(lock: Callable[[File, int], None], file: File, operation: int) -> bool:
    try:
        lock(file, operation)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # some file systems have no locks
    return True
