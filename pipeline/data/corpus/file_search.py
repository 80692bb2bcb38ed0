"""File search: the files at a path, in a folder or matching a glob, and the identity by which two names of one file are known.

Links are followed, and every folder is entered once, whatever links lead to it. Names that begin with a dot are left out.
"""

import errno
import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pipeline.data.errors import DataError

_EVERY_FOLDER_BELOW = re.compile(r"(?:^|/)\*\*(?:/+|$)")

Identity = tuple[int, int, int] | str
"""Equal for two names of one file: its device, inode and size; its real path on a file system without inodes."""


def find_files(path: str) -> list[Path]:
    """Find the files at a path: the file itself, those below a folder, or those that a glob matches, in a fixed order.

    Raises:
        DataError: a folder cannot be read.
    """
    matches = [path] if os.path.lexists(path) else sorted(set(_matches(path)))
    return [file for match in matches for file in (_files_below(match) if os.path.isdir(match) else [Path(match)])]


def identity(path: str | Path, stat: os.stat_result) -> Identity:
    """Identify a file by its status."""
    # The size is there because some network file systems make up inodes, and two files must not be taken for one.
    return (stat.st_dev, stat.st_ino, stat.st_size) if stat.st_ino else os.path.realpath(path)


def _matches(pattern: str) -> Iterator[str]:
    """Match a glob as `glob.glob(pattern, recursive=True)` does, which is lost where links lead back: with two of them it
    would go 2 ** 40 ways."""
    stars = _EVERY_FOLDER_BELOW.search(pattern)
    if stars is None:
        _check_folders(pattern)
        yield from glob.iglob(pattern)
        return

    # The folders before `**`; those below them, each once; in these what follows `**`.
    head = pattern[: stars.start()] or (os.sep if pattern[0] == os.sep else os.curdir)
    rest = pattern[stars.end() :]
    _check_folders(head)
    for folder in filter(os.path.isdir, glob.glob(head)):
        if not rest:
            yield folder
            continue
        for below, _ in _walk(folder):
            yield from _matches(os.path.join(glob.escape(below), rest))


def _check_folders(pattern: str) -> None:
    """Check that the folders in which a glob looks can be read: `glob` itself takes others for empty."""
    ends = [place for place, character in enumerate(pattern) if character == os.sep] + [len(pattern)]
    for slash, end in itertools.pairwise(ends):
        right = os.R_OK | os.X_OK if glob.has_magic(pattern[slash:end]) else os.X_OK
        for folder in filter(os.path.isdir, glob.glob(pattern[:slash] or os.sep)):
            if not os.access(folder, right):
                raise DataError(f"cannot read {folder}: {os.strerror(errno.EACCES)}")


def _files_below(folder: str) -> list[Path]:
    return sorted(Path(parent, name) for parent, names in _walk(folder) for name in names)


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Walk over the folders below a folder, each once; yields a folder and the names of its files."""
    seen = {_folder_identity(folder)}
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if name[0] != "." and _is_new(os.path.join(parent, name), seen)]
        yield parent, [name for name in names if name[0] != "."]


def _refuse(error: OSError) -> NoReturn:
    # os.walk would go on without the folder.
    raise DataError(f"cannot read {error.filename}: {error.strerror}")


def _is_new(folder: str, seen: set[tuple[int, int] | str]) -> bool:
    # Following a link to a folder that is listed already would read its files twice, or loop for ever.
    identity = _folder_identity(folder)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _folder_identity(folder: str) -> tuple[int, int] | str:
    stat = os.stat(folder)
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(folder)
