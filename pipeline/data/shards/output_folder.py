"""The output folder of a command: it appears complete or not at all, and one process at a time writes it.

It is written as `OUTPUT.partial` beside the output, and renamed at the end, so both must lie on one file system. Where OUTPUT
is a link, `OUTPUT.partial` lies beside the folder that it leads to; a mount point cannot be renamed to, and is refused at once.

A lock file in the folder keeps a second process out, with an error; it is removed at the end, and the operating system releases
the lock of a killed process. On a file system without locks a second process is not noticed.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.errors import DataError
from pipeline.storage.locks import take_lock
from pipeline.storage.whole_file import publish

LOCK_FILE = "lock"
_PARTIAL = ".partial"
# The request of a preparation that can be resumed (`corpus.request`), in its partial folder.
REQUEST_FILE = "request.json"
# Beside it if the preparation ended with an error about its input or settings.
FAILED_FILE = "failed"


@contextmanager
def atomic_folder(output_dir: Path) -> Iterator[Path]:
    """Open an empty folder `OUTPUT.partial`, and rename it to OUTPUT at the end of the block if nothing was raised.

    Raises:
        DataError: OUTPUT exists and is not an empty folder, or is a mount point; or OUTPUT.partial is being written by another
            process, is a preparation that can be resumed, or was not made by this program.
    """
    output_dir = real_output(output_dir)
    partial = partial_folder(output_dir)
    _refuse_if_occupied(output_dir)
    make_partial(partial)

    with locked(partial):
        _refuse_if_occupied(output_dir)  # again: the previous holder of the lock may have finished
        if (partial / REQUEST_FILE).exists():
            raise DataError(
                f"{partial} is a preparation that is not finished; finish it with its own launch/prepare.py command, remove "
                "it, or choose another output"
            )

        clear(partial)
        yield partial

        publish(partial, output_dir)
        # The lock file goes last: without it another process would take the folder for a foreign one.
        (output_dir / LOCK_FILE).unlink()


def _refuse_if_occupied(output_dir: Path) -> None:
    if is_occupied(output_dir):
        raise DataError(f"the output {output_dir} exists already; remove it, or choose another one")


def real_output(output_dir: Path) -> Path:
    """Find where an output folder lies: a link leads to another place, which need not exist yet.

    Raises:
        DataError: the output's path does not end in a name, or it is a mount point.
    """
    output_dir = Path(output_dir)
    # Path has made one slash of a URL's two.
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", str(output_dir)):
        raise DataError(f"expected an output folder of this machine, got the URL {output_dir}; write it here and copy it there")
    if output_dir.name in ("", ".."):
        raise DataError(f"expected an output folder with a name of its own, such as {output_dir / 'data'}, got {output_dir}")
    if output_dir.is_symlink():
        output_dir = Path(os.path.realpath(output_dir))
    if not is_occupied(output_dir) and _is_mount_point(output_dir):
        raise DataError(
            f"{output_dir} is a mount point, and a finished folder cannot be renamed to it; give a folder in it, such as "
            f"{output_dir / 'data'}"
        )
    return output_dir


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # Only the list of mounts, where such bytes are octal numbers, knows a folder that is mounted from the same file system.
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = re.sub(rb"[\\\s]", lambda byte: b"\\%03o" % ord(byte[0]), os.fsencode(os.path.realpath(folder)))
    return any(mount.split()[4] == name for mount in mounts)


def partial_folder(output_dir: Path) -> Path:
    """Name the folder beside an output (of `real_output`) in which it is written."""
    return output_dir.with_name(output_dir.name + _PARTIAL)


def is_occupied(output_dir: Path) -> bool:
    """Check if the output's path exists and is anything but an empty folder."""
    return os.path.lexists(output_dir) and not (output_dir.is_dir() and not any(output_dir.iterdir()))


def make_partial(partial: Path) -> None:
    """Create the partial folder, or accept the one that a killed process left.

    Raises:
        DataError: the folder holds files that this program did not write; they would be lost. Or it is on a file system of
            its own.
    """
    partial.mkdir(parents=True, exist_ok=True)
    if partial.stat().st_dev != partial.parent.stat().st_dev:
        raise DataError(f"{partial} lies on another file system than the output beside it; remove it, or choose another output")
    # This program creates the lock file before any other file.
    if not (partial / LOCK_FILE).exists() and any(partial.iterdir()):
        raise DataError(f"{partial} holds files that no interrupted command left there; move it away, or choose another output")


@contextmanager
def locked(partial: Path, lock_file: str = LOCK_FILE) -> Iterator[None]:
    """Lock a folder against other writers until the end of the block.

    Raises:
        DataError: another process holds the lock, or removed the lock file just now.
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
            # The lock file was removed since it was opened, so another process could create and lock a new one.
            raise just_ended
        yield


def remove(partial: Path) -> None:
    """Remove a locked folder, if it exists. The lock file goes last, so that the rest is known as ours if this is killed."""
    with suppress(FileNotFoundError):
        clear(partial)
    shutil.rmtree(partial, ignore_errors=True)


def clear(partial: Path) -> None:
    """Remove everything but the lock file from a locked folder."""
    for leftover in partial.iterdir():
        if leftover.name != LOCK_FILE:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
