"""Whose fault it is that a file cannot be read: that of the data, or of the machine or storage that it is read from."""

import errno
import os
from pathlib import Path

from pipeline.storage.files import Access, StorageError, fetch, read_whole
from pipeline.storage.location import Place, Url


def raise_if_of_the_machine(error: OSError, folder: Place, witness: str) -> None:
    """Tell what is wrong with a file of `folder` from what is wrong with the machine that reads it. The file is missing, though
    `witness`, a file that was there before, still is, or it ends too early (an error of ours, without a number): returns.
    Whatever else there is (too many open files, no permission, a disk or server that does not answer, the folder gone or not
    mounted) says nothing about the data. For what is missing in a remote folder `raise_if_gone` asks.

    Raises:
        StorageError: it is the machine.
    """
    if isinstance(error, StorageError):
        raise error
    # Not `Path.is_file`, which itself raises what it meets: no permission, a stale handle.
    is_there = not isinstance(folder, Path) or os.path.isfile(folder / witness)
    if error.errno is None or (error.errno == errno.ENOENT and is_there):
        return
    where, what = error.filename or folder, error.strerror or error
    remedy = "raise its limit, `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "mend that and go on"
    raise StorageError(f"{where} cannot be read: {what}; the machine is at fault and not the data: {remedy}") from None


def raise_if_gone(place: Place, access: Access) -> None:
    """Tell a file of a remote folder that is missing from a folder that cannot be reached any more, by another file of it
    that was there before.

    Raises:
        StorageError: that one cannot be read either.
    """
    try:
        fetch(place, 0, 1, access) if isinstance(place, Url) and not place.is_pipe else read_whole(place, access)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{place} was read before and cannot be read now: {error.strerror or error}; the folder was moved or cannot be "
            "reached, which says nothing about the data: mend that and go on"
        ) from None
