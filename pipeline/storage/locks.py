"""File locks of the operating system: held until the file is closed, and released if the process is killed.

Whether they work between machines depends on the file system. On a file system without locks, every request for a lock
succeeds.
"""

import fcntl
from collections.abc import Callable
from typing import IO

File = int | IO[str] | IO[bytes]
"""A file that is open for writing, or its descriptor."""


def take_lock(file: File, *, wait: bool = False) -> bool:
    """Lock an open file; returns false if the file is locked through another open file, of any process (never with `wait`).

    A forked process inherits the open file, and the lock then lasts until that process has closed it too.
    """
    return _take(fcntl.flock, file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_lock_of_process(file: File) -> bool:
    """Lock a file for this process alone, not for processes that it forks; returns false if another process holds the lock.

    All open files of this process share the lock, and closing any of them releases it.
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
