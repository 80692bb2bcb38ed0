"""Who writes to a folder that is not finished: one process at a time, whoever comes second is told so.

The lock is a file in the folder, removed when all is done; that of a killed process is released by the system. Some file
systems have no locks: there nobody is told.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.manifest import DataError

LOCK_FILE = "lock"


def make_partial(partial: Path) -> None:
    """Make this folder, or take the one that a killed process left.

    Raises:
        DataError: no process of this program left it: what is in it would be lost.
    """
    partial.mkdir(parents=True, exist_ok=True)
    # Whoever writes to it takes the lock first.
    if not (partial / LOCK_FILE).exists() and any(partial.iterdir()):
        raise DataError(f"{partial} holds files that no interrupted command left there; move it away, or choose another output")


@contextmanager
def locked(partial: Path, lock_file: str = LOCK_FILE) -> Iterator[None]:
    """Nobody else may write to this folder until the end of the block.

    Raises:
        DataError: somebody does already, or did until now.
    """
    just_ended = DataError(f"another process was writing to {partial} until now; look what it made, and try again")
    try:
        file = open(partial / lock_file, "wb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise just_ended from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing to {partial}; wait for it, or stop it") from None
        except OSError:
            pass  # some file systems have no locks
        if not os.fstat(file.fileno()).st_nlink:
            # It was removed since it was opened, so that the next would lock another one.
            raise just_ended
        yield


def remove(partial: Path) -> None:
    """Remove a folder that is locked, if it is there; the lock last, so that what is left by a kill is known for our own."""
    with suppress(FileNotFoundError):
        clear(partial)
    shutil.rmtree(partial, ignore_errors=True)


def clear(partial: Path) -> None:
    """Remove what a killed process left in a folder that is locked."""
    for leftover in partial.iterdir():
        if leftover.name != LOCK_FILE:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
