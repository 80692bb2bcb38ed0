"""Atomic writes: a file appears complete or not at all, and durable: once it appears, it is on the disk.

A file is written under a temporary name in the same folder, synced, and renamed to its name. Then the folder is synced too,
because it holds the name. Even a crash of the machine therefore leaves either the old file or the new one, and files are on
the disk in the order in which they were written. A write that fails leaves the old file and no temporary one; only a kill can
leave a `NAME.PROCESS-THREAD.tmp`.
"""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Errors of file systems that cannot sync folders, and of a folder that may be written but not read.
_CANNOT_BE_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def write_file(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Write `data` to a file atomically; arguments as `atomic_write`."""
    with atomic_write(path, synced=synced) as file:
        file.write(data)


@contextmanager
def atomic_write(path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing; it gets its name at the end of the block, after all of it is on the disk.

    Args:
        path: of the file.
        synced: false to skip the syncing, which takes time. A crash of the machine may then leave a cut file under this name,
            so it is only for files whose readers check them, such as a cache's.
    """
    # The name is of this thread alone, because another process may write the same file: one that outlived its killed parent,
    # or any other on a file system without locks.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name this file in an error that names none: the error of a write to an open file, such as a full disk's, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def publish(source: Path, path: Path) -> None:
    """Sync a finished file or folder and rename it to `path`, on the same file system.

    Of a folder only the list of its files is synced here. Files that this module wrote are on the disk already.
    """
    if source.is_dir():
        _sync_folder(source)
    else:
        sync_file(source)
    os.replace(source, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in _CANNOT_BE_SYNCED:
            raise


def sync_file(path: Path) -> None:
    """Have a file or folder on the disk as it is now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_on_disk(path: Path) -> int:
    """Return the free bytes of the disk on which a path lies, or will lie once it is made."""
    path = path.absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free
