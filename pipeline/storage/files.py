"""Bytes of a file at a position, from wherever the file lies.

A local file is read by `pread`: no seek, because a descriptor's position would be shared with a forked loader worker. A
remote one is read by range requests through fsspec, again and again until `retry_seconds` are over: connections drop,
servers restart, answers end early. What no repetition can mend (no such file, no permission, a file that is too short)
is said at once. A pipe cannot be asked for a range: its whole output goes to a temporary file first.
"""

import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.storage.disk_cache import DiskCache
from pipeline.storage.location import PIPE, Place, Url

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 10.0
_WRONG_ANSWERS = 4
# A shell's codes from here on: a command that it may not run, does not find, or that a signal killed; ssh's for no connection.
_NOT_RUN = 126
_PIPE_PAUSE = 0.5
_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 30.0


class StorageError(OSError):
    """Data cannot be reached; its bytes may be as good as ever. One message, ready to be shown."""


@dataclass(frozen=True)
class Access:
    """How data that is not on this machine is reached.

    retry_seconds: how long a read is repeated. cache_dir, cache_bytes: a folder of this machine for what was read, and the
    bytes it may take. allow_pipe: whether a `pipe:` may run its command. abandoned: once set, no read is repeated any more.
    """

    retry_seconds: float = 120.0
    cache_dir: Path | None = None
    cache_bytes: int = 64 * 2**30
    allow_pipe: bool = False
    abandoned: threading.Event | None = field(default=None, compare=False)


DIRECT = Access()
"""Without cache and pipes."""


class OpenFile(Protocol):
    """A file of which any part can be read."""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, or fewer if the file ends before.

        Raises:
            StorageError: it cannot be reached.
            OSError: it cannot be read.
        """

    def forget(self, start: int, size: int) -> bool:
        """Drop copies of these bytes; True if there may have been any, so that reading again may give others."""

    def close(self) -> None:
        """Free what it holds."""


def open_file(place: Place, size: int, access: Access) -> OpenFile:
    """Open a file that should have `size` bytes.

    Raises:
        OSError: it is not there.
        StorageError: it cannot be reached.
    """
    if isinstance(place, Path):
        return LocalFile(place)
    if place.is_pipe:
        return PipeFile(place, access)
    return RemoteFile(place, size, access)


def read_whole(place: Place, access: Access) -> bytes:
    """A small file's bytes; raises as `open_file`."""
    if isinstance(place, Path):
        return place.read_bytes()
    if place.is_pipe:
        pipe = PipeFile(place, access)
        try:
            return pipe.read(0, pipe.size)
        finally:
            pipe.close()
    return fetch(place, 0, None, access)


class LocalFile:
    """A file of this machine."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)
        while 0 < len(data) < size and (more := os.pread(self._descriptor, size - len(data), start + len(data))):
            data += more
        return data

    def forget(self, start: int, size: int) -> bool:
        return False

    def close(self) -> None:
        os.close(self._descriptor)


class RemoteFile:
    """A file behind a URL: by ranges, or through the cache if there is one."""

    def __init__(self, url: Url, size: int, access: Access) -> None:
        self.url = url
        self.size = size
        self._access = access
        try:
            self._cache = None if access.cache_dir is None else DiskCache(access.cache_dir, access.cache_bytes)
        except OSError as error:
            raise StorageError(f"data.cache_dir: {access.cache_dir} cannot be used: {error.strerror}") from None

    def read(self, start: int, size: int) -> bytes:
        size = max(0, min(size, self.size - start))
        if self._cache is None or not size:
            return fetch(self.url, start, size, self._access) if size else b""
        return self._cache.read(self.url, start, size, self.size, lambda at, length: fetch(self.url, at, length, self._access))

    def forget(self, start: int, size: int) -> bool:
        if self._cache is None:
            return False
        # True even if nothing is there any more: what was read may be a copy that somebody else has dropped since.
        self._cache.forget(self.url, start, size)
        return True

    def close(self) -> None:
        pass


class PipeFile:
    """All that a command prints, in a temporary file of `cache_dir` or the system's temporary folder."""

    def __init__(self, pipe: Url, access: Access) -> None:
        if not access.allow_pipe:
            raise StorageError(f"{pipe}: a pipe runs a command of the shell; allow it by data.allow_pipe=true, or use a URL")
        if access.cache_dir is not None:
            access.cache_dir.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=access.cache_dir)  # noqa: SIM115 (closed by `close`)
        done = self._run(pipe)
        if 0 < done.returncode < _NOT_RUN:
            # It may say that there is no such file, or mean a connection that broke: a second time tells most of these apart.
            time.sleep(min(_PIPE_PAUSE, access.retry_seconds))
            done = self._run(pipe)
        self.size = os.fstat(self._file.fileno()).st_size
        if done.returncode:
            self.close()
            said = " ".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])
            if not 0 < done.returncode < _NOT_RUN:
                raise StorageError(
                    f"{pipe}: the command could not be run to its end, code {done.returncode}: {said}; the machine is at fault "
                    "and not the data: mend that and go on"
                )
            raise FileNotFoundError(2, f"the command ended with code {done.returncode}: {said}", str(pipe))

    def _run(self, pipe: Url) -> "subprocess.CompletedProcess[bytes]":
        self._file.seek(0)
        self._file.truncate()
        return subprocess.run(pipe.removeprefix(PIPE), shell=True, stdout=self._file, stderr=subprocess.PIPE, check=False)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, start)

    def forget(self, start: int, size: int) -> bool:
        return False

    def close(self) -> None:
        self._file.close()


def fetch(url: Url, start: int, size: int | None, access: Access) -> bytes:
    """A range of a remote file (`size` None: all of it), repeated until it comes or the time is over.

    Raises:
        StorageError: it did not come in time, or cannot come.
        FileNotFoundError: there is no such file.
    """
    system, path = _file_system(url, access)
    wanted = {} if size is None else {"start": start, "end": start + size}
    began, attempts, answers, pause = time.monotonic(), 0, 0, _FIRST_PAUSE
    while True:
        attempts += 1
        try:
            data = system.cat_file(path, **wanted)
            if size is None or len(data) == size:
                return data
            problem = f"the answer to a request for {size} bytes had {len(data)}"
            # A server that does not know ranges, or a page to log in, answers a request for one byte with more too.
            is_no_range = len(data) > size or len(system.cat_file(path, start=start, end=start + 1)) > 1
            answers += 1
            if answers == _WRONG_ANSWERS:
                if is_no_range:
                    raise StorageError(f"{url}: {problem}, {answers} times; its server, or what is before it, ignores ranges")
                raise OSError(f"{url}: {problem}, {answers} times; the file is cut")
        except Exception as error:  # every file system has its own kinds
            if answers == _WRONG_ANSWERS or _is_final(error):
                raise _final(error, url) from None
            problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if time.monotonic() - began + pause > access.retry_seconds:
            raise StorageError(
                f"{url}: not read in {access.retry_seconds:g} s (data.retry_seconds), {attempts} attempts; {problem}"
            )
        if access.abandoned is None:
            time.sleep(pause)
        elif access.abandoned.wait(pause):
            raise StorageError(f"{url}: not read; its reader was closed meanwhile; {problem}")
        pause = min(2 * pause, _LONGEST_PAUSE)


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, FileNotFoundError | PermissionError)


def _final(error: Exception, url: Url) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(2, "No such file", str(url))
    if getattr(error, "status", None) == 416:
        return OSError(f"{url}: the file ends before the bytes that were asked for")
    return StorageError(f"{url}: {error}") if not isinstance(error, OSError) or isinstance(error, PermissionError) else error


_open_systems: dict[tuple[int, str, float], Any] = {}


def _file_system(url: Url, access: Access) -> tuple[Any, str]:
    """fsspec's file system, one a process (its threads do not survive a fork), and the URL as it wants it."""
    import fsspec

    # Long enough for a busy server, short enough to be tried again in time.
    silent_seconds = min(_SILENT_SECONDS, max(1.0, access.retry_seconds / 4))
    key = (os.getpid(), url.scheme, silent_seconds)
    try:
        if key not in _open_systems:
            _open_systems[key] = fsspec.filesystem(url.scheme, **_options(url.scheme, silent_seconds))
        return _open_systems[key], _open_systems[key]._strip_protocol(str(url))
    except ImportError as error:
        raise StorageError(f"{url}: {error}; {_remedy(url.scheme)}") from None
    except ValueError as error:
        raise StorageError(f"{url}: {error}; expected a folder, https://, http:// or s3://") from None


def _remedy(scheme: str) -> str:
    return "pip install 'selective-mtp[remote]'" if scheme in ("http", "https", "s3") else f"install what {scheme}:// needs"


def _options(scheme: str, silent_seconds: float) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    # By default a silent connection is given five minutes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silent_seconds)
    return {"client_kwargs": {"timeout": timeout}}
