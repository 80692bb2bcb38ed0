"""Who writes to a folder that is not finished: one process at a time, whoever comes second is told so.

The lock is a file in the folder; that of a killed process is released by the system. Some file systems have no locks: there
nobody is told.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.manifest import DataError

LOCK_FILE = "lock"


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Nobody else may write to this folder until the end of the block.

    Raises:
        DataError: somebody does already.
    """
    with open(partial / LOCK_FILE, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing to {partial}; wait for it, or stop it") from None
        except OSError:
            pass  # some file systems have no locks
        yield


def clear(partial: Path) -> None:
    """Remove what a killed process left in a folder that is locked."""
    for leftover in partial.iterdir():
        if leftover.name != LOCK_FILE:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
