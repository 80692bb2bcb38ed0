"""Reading tars that others wrote, without trusting them.

tarfile stops silently at a damaged header, or where the file was cut between two members. `members` raises an error instead:
the last member must be followed by the end mark of a tar, and by nothing else. Nothing is ever extracted to disk: a member is
a name and a byte range, read only on request.
"""

import os
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.data.errors import DataError
from pipeline.storage.lfs_pointer import pointer_problem

_BLOCK = 512
_CHUNK = 1 << 20
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar. `header` is the offset of its (first) header, `data` the offset of its `size` bytes. `hard_link` names
    the member that it is another name of, "" if of none."""

    name: str
    is_file: bool
    is_folder: bool
    header: int
    data: int
    size: int
    hard_link: str = ""

    @property
    def end(self) -> int:
        """The offset after the member's data and padding."""
        return self.data + self.size + -self.size % _BLOCK


def members(path: Path, file: BinaryIO | None = None) -> Iterator[Member]:
    """Iterate over the members of an uncompressed tar, in order.

    Args:
        path: of the tar.
        file: the same, open, if its owner wants a say in how it is read; without a buffer only headers are read.

    Raises:
        DataError: the file is not a tar, is cut, has a damaged header or a sparse member; the message names the file.
    """
    end = 0
    try:
        with nullcontext(file) if file else open(path, "rb") as opened, tarfile.open(path, "r:", opened) as tar:
            while (entry := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                if entry.issparse():
                    raise DataError(f"{path}: the member {entry.name!r} is a sparse file; pack it as a plain one")
                size = entry.size if entry.isreg() else 0
                link = entry.linkname if entry.islnk() else ""
                where = entry.offset, entry.offset_data, size
                member = Member(entry.name, entry.type in _FILE_TYPES, entry.isdir(), *where, link)
                end = member.end
                yield member
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problem = f"{path} is damaged: {error} at byte {end} or after it; copy it again"
        raise DataError(pointer_problem(path) or problem) from None
    _check_end(path, end)


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Read a member of the tar that is open as `file`.

    Raises:
        DataError: the file ends before the member does.
    """
    file.seek(member.data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise DataError(f"{file.name} is damaged: it ends within its member {member.name!r}; copy it again")
    return data


def _check_end(path: Path, end: int) -> None:
    size = os.path.getsize(path)
    if size < end + 2 * _BLOCK:
        raise DataError(f"{path} is damaged: it has {size} bytes and no end mark; it was cut, copy it again")
    with open(path, "rb") as file:
        file.seek(end)
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise DataError(f"{path} is damaged: what follows byte {end} is neither a member nor the end; copy it again")
