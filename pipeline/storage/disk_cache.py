"""Disk cache: parts of remote files in a local folder of bounded size, shared by all processes that use the folder.

A remote file is cached in parts of 1 MiB, each a file of its own that is written atomically. Space is reserved before a part
is written: under the folder's lock the size of the cache is summed up, and if it would be too large, the least recently used
parts are evicted. A reader whose part is evicted meanwhile fetches it again. If two processes want the same part at the same
time, it is fetched once; the same holds for threads of one process, even on a file system without locks.

A cache only saves time. Its problems, such as a full disk or a file system without locks, never become errors of the reader.
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
# Seconds; longer than a part takes to fetch, retries included.
_LONGEST_WAIT = 600.0
# An eviction leaves this fraction of the capacity. Making room for many parts at once avoids listing the folder for each.
_EVICTION_TARGET = 0.9

# Locks by (process, path). The process is part of the key, because a fork copies a locked lock without the thread that would
# release it.
_thread_locks: dict[tuple[int, str], threading.Lock] = {}


class DiskCache:
    """Cache of at most `capacity` bytes in `directory`."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self.directory = directory
        self.capacity = capacity
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, url: str, start: int, size: int, file_size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Read `size` bytes from `start` of a file of `file_size` bytes; `fetch(start, size)` gets missing parts."""
        parts = range(start // PART, (start + size - 1) // PART + 1)
        data = b"".join(self._part(url, part, file_size, fetch) for part in parts)
        return data[start - parts.start * PART :][:size]

    def invalidate(self, url: str, start: int, size: int) -> None:
        """Remove the parts that have these bytes."""
        for part in range(start // PART, (start + size - 1) // PART + 1):
            _removed(self._path(url, part))

    def _part(self, url: str, part: int, file_size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Read a part from the cache, or fetch and cache it; the second look, under its lock, is for one fetched meanwhile."""
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
        with self._locked("lock"), suppress(OSError):  # on a full disk the part is just not cached
            self._make_room(len(data))
            # Not synced, because all readers of the cache would wait for it. If a crash of the machine cuts a part, its readers
            # find it damaged, invalidate it and fetch it again.
            write_file(path, data, synced=False)

    def _make_room(self, size: int) -> None:
        """Reserve `size` bytes; called under the lock. The sum of sizes is kept in a file. A kill can leave it wrong, and the
        next eviction corrects it."""
        count = self.directory / "bytes"
        try:
            used = int(count.read_text())
        except (OSError, ValueError):
            used = self._evict(size)
        if used + size > self.capacity:
            used = self._evict(size)
        count.write_text(str(used + size))

    def _evict(self, size: int) -> int:
        """Evict the least recently used parts until `size` more bytes fit; returns the bytes that remain in use."""
        parts = sorted(self._parts_with_ages())
        used = sum(bytes_ for _, bytes_, _ in parts)
        target = self.capacity - size
        if used > target:
            target = min(target, int(self.capacity * _EVICTION_TARGET))
        for _, bytes_, path in parts:
            if used <= target:
                break
            used -= bytes_ if _removed(Path(path)) else 0
        return used

    def _parts_with_ages(self) -> Iterator[tuple[int, int, str]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.partition(".")[0].count("-") == 1 and len(entry.name) > 20:
                    with suppress(FileNotFoundError):  # removed by another reader since it was listed
                        found = entry.stat()
                        yield found.st_mtime_ns, found.st_size, entry.path

    def _path(self, url: str, part: int) -> Path:
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{part:06d}"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = str(self.directory / name)
        with _thread_locks.setdefault((os.getpid(), path), threading.Lock()), ExitStack() as opened:
            with suppress(OSError):  # the folder is read-only
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                opened.callback(os.close, descriptor)
                # A reader that stands still holds up the others for a while; then they fetch what it was to fetch.
                take_lock(descriptor, wait=_LONGEST_WAIT)
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
