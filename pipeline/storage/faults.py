"""Faults: tell damaged data from a fault of the machine or storage, when a file cannot be read."""

import errno
import os
from pathlib import Path

from pipeline.storage.files import Access, StorageError, fetch, read_whole
from pipeline.storage.location import Location, Url


def raise_if_machine_fault(error: OSError, folder: Location, known_file: str) -> None:
    """Raise an error if the machine is at fault for `error`; return if the file itself is missing or cut.

    The file counts as missing if `known_file`, which was in the folder before, is still there, and as cut if the error is one
    of ours, without an errno. All other errors (too many open files, no permission, a disk or server that does not answer, a
    folder that is gone or not mounted) say nothing about the data. A file that is missing in a remote folder needs the further
    check of `raise_if_folder_unreachable`.

    Raises:
        StorageError: the machine is at fault.
    """
    if isinstance(error, StorageError):
        raise error
    # Not Path.is_file, which raises some errors itself (no permission, a stale file handle).
    is_there = not isinstance(folder, Path) or os.path.isfile(folder / known_file)
    if error.errno is None or (error.errno == errno.ENOENT and is_there):
        return
    where, what = error.filename or folder, error.strerror or error
    remedy = "raise its limit, `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "mend that and go on"
    raise StorageError(f"{where} cannot be read: {what}; the machine is at fault and not the data: {remedy}") from None


def raise_if_folder_unreachable(location: Location, access: Access) -> None:
    """Raise an error if `location`, a file that could be read before, cannot be read now.

    This tells a file that is missing in a remote folder from a folder that cannot be reached.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        fetch(location, 0, 1, access) if isinstance(location, Url) and not location.is_pipe else read_whole(location, access)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{location} was read before and cannot be read now: {error.strerror or error}; the folder was moved or cannot be "
            "reached, which says nothing about the data: mend that and go on"
        ) from None
