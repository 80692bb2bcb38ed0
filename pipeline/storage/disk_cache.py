"""Parts of remote files in a folder of this machine, of bounded size, shared by all processes that name it.

A file is kept in parts of 1 MiB, each a file of its own that appears by a rename, so one that is there is complete. Room
is taken before a part is written: under the folder's lock the bytes in use are added up and, where they would be too
many, the parts that were used longest ago go. A reader whose part goes meanwhile fetches it again. Two processes that
want the same part at once fetch it once; two threads of a process do so even where the file system has no locks.

A cache only saves time: what goes wrong with it (a full disk, a file system without locks) is never the reader's error.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.storage.locks import take_lock
from pipeline.storage.whole_file import write_file

PART = 2**20
_NUM_LOCKS = 64
# What an eviction leaves: making room for many parts at once spares listing the folder for each.
_LEFT = 0.9

# By process, because a fork copies a lock as it is, but not the thread that would release it; and by path.
_thread_locks: dict[tuple[int, str], threading.Lock] = {}


class DiskCache:
    """At most `capacity` bytes of parts in `directory`."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self.directory = directory
        self.capacity = capacity
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, url: str, start: int, size: int, file_size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """`size` bytes from `start` of the file behind `url`; `fetch(start, size)` gets those that are not here."""
        parts = range(start // PART, (start + size - 1) // PART + 1)
        data = b"".join(self._part(url, part, file_size, fetch) for part in parts)
        return data[start - parts.start * PART :][:size]

    def forget(self, url: str, start: int, size: int) -> None:
        """Remove the parts that hold these bytes."""
        for part in range(start // PART, (start + size - 1) // PART + 1):
            _removed(self._path(url, part))

    def _part(self, url: str, part: int, file_size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        path = self._path(url, part)
        data = _read(path)
        if data is None:
            with self._locked(f"lock-{int(path.name[:8], 16) % _NUM_LOCKS:02d}"):
                data = _read(path)
                if data is None:
                    data = fetch(part * PART, min(PART, file_size - part * PART))
                    self._add(path, data)
        return data

    def _add(self, path: Path, data: bytes) -> None:
        if len(data) > self.capacity:
            return
        with self._locked("lock"), suppress(OSError):  # a full disk costs only the copy
            self._make_room(len(data))
            # Not synced, for all who read through the cache would wait for that; what a crash of the machine cuts is damage to
            # its readers, who forget it and fetch it again.
            write_file(path, data, synced=False)

    def _make_room(self, size: int) -> None:
        """Called under the lock. The sum of sizes is kept in a file; a kill can leave it wrong, an eviction makes it right."""
        count = self.directory / "bytes"
        try:
            used = int(count.read_text())
        except (OSError, ValueError):
            used = self._evict(size)
        if used + size > self.capacity:
            used = self._evict(size)
        count.write_text(str(used + size))

    def _evict(self, size: int) -> int:
        """Remove what was used longest ago, until `size` more bytes fit; returns the bytes that are left."""
        parts = sorted(self._ages_and_sizes())
        used = sum(bytes_ for _, bytes_, _ in parts)
        goal = self.capacity - size
        if used > goal:
            goal = min(goal, int(self.capacity * _LEFT))
        for _, bytes_, path in parts:
            if used <= goal:
                break
            used -= bytes_ if _removed(Path(path)) else 0
        return used

    def _ages_and_sizes(self) -> Iterator[tuple[int, int, str]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.partition(".")[0].count("-") == 1 and len(entry.name) > 20:
                    with suppress(FileNotFoundError):  # forgotten by another reader since it was listed
                        found = entry.stat()
                        yield found.st_mtime_ns, found.st_size, entry.path

    def _path(self, url: str, part: int) -> Path:
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{part:06d}"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = str(self.directory / name)
        with _thread_locks.setdefault((os.getpid(), path), threading.Lock()), ExitStack() as opened:
            with suppress(OSError):  # a folder that cannot be written to
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                opened.callback(os.close, descriptor)
                take_lock(descriptor, wait=True)
            yield


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    return data


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
