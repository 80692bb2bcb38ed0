"""The one way to write a file that is there whole or not at all, and on the disk once it is there.

It is written under another name beside its own, synced and renamed; then the folder is synced, because that is where the name
is kept. So a crash of the machine, too, leaves the old file or the new one, and nothing that was written after it without it. A
write that fails leaves the old file and no other name; only a kill can leave `NAME.PROCESS-THREAD.tmp`.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What a file system says that syncs no folders, or of a folder that may be written to and not be read.
_CANNOT_BE_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def write_file(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Write a file that is there whole or not at all; see `whole_file`."""
    with whole_file(path, synced=synced) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
    """Open a file to write to that gets its name at the end of the block, once all of it is on the disk.

    `synced` False leaves that to the operating system: a crash of the machine may then leave a file that is cut, which only a
    reader who knows its checksum can do with.
    """
    # Of this thread alone: a process that outlived its killed parent, or any where there are no locks, may be writing the same.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if synced:
        _sync_folder(path.parent)


def publish(made: Path, path: Path) -> None:
    """Give a finished file or folder its name, once it is on the disk; both names lie in one file system.

    The files in a folder are on the disk if this module wrote them; here only the folder's list of them is synced.
    """
    if made.is_dir():
        _sync_folder(made)
    else:
        _sync(made)
    os.replace(made, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _CANNOT_BE_SYNCED:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
