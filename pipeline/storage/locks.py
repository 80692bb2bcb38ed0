"""File locks of the operating system: held until the file is closed, and released if the process is killed.

Whether they work between machines depends on the file system. On a file system without locks, every request for a lock
succeeds.
"""

import fcntl
import time
from collections.abc import Callable
from typing import IO

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1

File = int | IO[str] | IO[bytes]
"""A file that is open for writing, or its descriptor."""


def take_lock(file: File, *, wait: float = 0.0) -> bool:
    """Lock an open file; returns false if the file is locked through another open file, of any process, for `wait` seconds on.

    A forked process inherits the open file, and the lock then lasts until that process has closed it too.
    """
    ends, pause = time.monotonic() + wait, _SHORTEST_PAUSE
    while not _take(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() >= ends:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


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
