"""The folder that a command makes: whole or absent, and written by one process at a time.

It is made under another name beside the output, `OUTPUT.partial`, and renamed once. Whoever comes second is told so. The lock
is a file in the folder, removed when all is done; that of a killed process is released by the system. Some file systems have no
locks: there nobody is told.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.errors import DataError
from pipeline.storage.locks import take_lock
from pipeline.storage.whole_file import publish

LOCK_FILE = "lock"
_PARTIAL = ".partial"
# In a partial folder of `corpus.prepare_files`: what was asked for.
REQUEST_FILE = "request.json"


@contextmanager
def whole_or_absent(output_dir: Path) -> Iterator[Path]:
    """A new folder `OUTPUT.partial` to write to, renamed to OUTPUT at the end of the block if nothing was raised.

    Raises:
        DataError: OUTPUT exists and is not an empty folder, or another process is writing to its partial folder, or that is a
            preparation that can be gone on with, or not of this program.
    """
    output_dir = Path(output_dir)
    partial = partial_of(output_dir)
    _refuse_if_taken(output_dir)
    make_partial(partial)
    with locked(partial):
        _refuse_if_taken(output_dir)  # by whoever had the lock until now
        if (partial / REQUEST_FILE).exists():
            raise DataError(
                f"{partial} is a preparation that is not finished; finish it with its own launch/prepare.py command, remove "
                "it, or choose another output"
            )
        clear(partial)
        yield partial
        publish(partial, output_dir)
        # Last: without it another process would take a folder that is written to for one that was left.
        (output_dir / LOCK_FILE).unlink()


def _refuse_if_taken(output_dir: Path) -> None:
    if is_taken(output_dir):
        raise DataError(f"the output {output_dir} exists already; remove it, or choose another one")


def partial_of(output_dir: Path) -> Path:
    """The folder beside the output in which it is made.

    Raises:
        DataError: the output's path does not end in a name.
    """
    if output_dir.name in ("", ".."):
        raise DataError(f"expected an output folder with a name of its own, such as {output_dir / 'data'}, got {output_dir}")
    return output_dir.with_name(output_dir.name + _PARTIAL)


def is_taken(output_dir: Path) -> bool:
    """Whether there is something at the output's path other than an empty folder."""
    return os.path.lexists(output_dir) and not (output_dir.is_dir() and not any(output_dir.iterdir()))


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
        if not take_lock(file):
            raise DataError(f"another process is writing to {partial}; wait for it, or stop it")
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
