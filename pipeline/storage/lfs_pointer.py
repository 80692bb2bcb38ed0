"""Pointers of Git LFS: the few lines that a checkout has in place of a large file which was not fetched."""

from pathlib import Path

_FIRST_BYTES = b"version https://git-lfs.github.com/spec/"


def pointer_problem(path: Path | str, head: bytes | None = None) -> str | None:
    """Say that a file is a pointer and what to do; None if it is none, or cannot be read.

    Args:
        path: of the file.
        head: its first bytes, where they are known; else they are read.
    """
    if head is None:
        try:
            with open(path, "rb", buffering=0) as file:
                head = file.read(len(_FIRST_BYTES))
        except OSError:
            return None
    if not head.startswith(_FIRST_BYTES):
        return None
    return f"{path} is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull`"
