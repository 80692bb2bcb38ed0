"""Reading byte ranges of files, local or remote.

Local files are read by `pread`, without seeking, because a forked loader worker would share the position of the descriptor.

Remote files are read by range requests through fsspec. Connections drop, servers restart and answers end early, so a request
is retried, with growing pauses, for `retry_seconds`. Errors that no retry can mend (no such file, no permission, a file that
is too short) are raised at once.

A pipe has no ranges: its whole output is written to a temporary file first. A command that gives nothing for `retry_seconds` is
ended.
"""

import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.storage.command import Ended, run_command
from pipeline.storage.disk_cache import DiskCache
from pipeline.storage.location import PIPE, Location, Url
from pipeline.storage.masking import masked_answer, masked_text

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 10.0
_MAX_WRONG_ANSWERS = 4
# Exit codes from here on mean that a command did not run to its end: not executable (126), not found (127), killed by a signal
# (128 and more), or no connection (ssh, 255).
_NOT_RUN = 126
_PIPE_PAUSE = 0.5
_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 30.0


class StorageError(OSError):
    """The data cannot be reached, which says nothing about its bytes. The message is ready to be shown to the user."""


@dataclass(frozen=True)
class Access:
    """Settings of access to data that is not on this machine.

    retry_seconds: for how long a read is retried, and a pipe's command may give nothing.
    cache_dir: local folder of the disk cache; None for no cache.
    cache_bytes: capacity of the disk cache.
    allow_pipe: if true, a `pipe:` may run its command.
    cancelled: an event that stops all retries when it is set.
    """

    retry_seconds: float = 120.0
    cache_dir: Path | None = None
    cache_bytes: int = 64 * 2**30
    allow_pipe: bool = False
    cancelled: threading.Event | None = field(default=None, compare=False)


DIRECT = Access()
"""Access without a cache or pipes."""


class OpenFile(Protocol):
    """An open file with random access."""

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes from `start`, or fewer if the file ends before.

        Raises:
            StorageError: the file cannot be reached.
            OSError: the file cannot be read.
        """

    def invalidate(self, start: int, size: int) -> bool:
        """Drop cached copies of these bytes. Returns true if there may have been any, so that reading again is worthwhile."""

    def close(self) -> None:
        """Close the file and free its resources."""


def open_file(location: Location, size: int, access: Access) -> OpenFile:
    """Open a file that should have `size` bytes.

    Raises:
        OSError: there is no such file.
        StorageError: the file cannot be reached.
    """
    if isinstance(location, Path):
        return LocalFile(location)
    if location.is_pipe:
        return PipeFile(location, access)
    return RemoteFile(location, size, access)


def read_whole(location: Location, access: Access) -> bytes:
    """Read all bytes of a small file; errors as `open_file`."""
    if isinstance(location, Path):
        return location.read_bytes()
    if location.is_pipe:
        pipe = PipeFile(location, access)
        try:
            return pipe.read(0, pipe.size)
        finally:
            pipe.close()
    return fetch(location, 0, None, access)


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)
        while 0 < len(data) < size and (more := os.pread(self._descriptor, size - len(data), start + len(data))):
            data += more
        return data

    def invalidate(self, start: int, size: int) -> bool:
        return False

    def close(self) -> None:
        os.close(self._descriptor)


class RemoteFile:
    """A file at a URL, read by range requests, and through the disk cache if there is one."""

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

    def invalidate(self, start: int, size: int) -> bool:
        if self._cache is None:
            return False
        # True even if there is no copy now: the bytes may have been read from a copy that another reader has dropped since.
        self._cache.invalidate(self.url, start, size)
        return True

    def close(self) -> None:
        pass


class PipeFile:
    """The output of a command, in a temporary file in `cache_dir` or the system's temporary folder."""

    def __init__(self, pipe: Url, access: Access) -> None:
        if not access.allow_pipe:
            raise StorageError(f"{pipe}: a pipe runs a command of the shell; allow it by data.allow_pipe=true, or use a URL")
        if access.cache_dir is not None:
            access.cache_dir.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=access.cache_dir)  # noqa: SIM115 (closed by `close`)

        # Run the command. An error code may mean that there is no such file, or that a connection broke: a second try tells
        # most of these apart.
        done = self._run(pipe, access)
        if done.code is not None and 0 < done.code < _NOT_RUN:
            time.sleep(min(_PIPE_PAUSE, access.retry_seconds))
            done = self._run(pipe, access)

        self.size = os.fstat(self._file.fileno()).st_size
        if done.code == 0:
            return
        self.close()
        last_line = " ".join(done.errors.strip().splitlines()[-1:])
        last_line = masked_answer(last_line, pipe.removeprefix(PIPE), pipe.file)
        if done.code is None:
            silent = f"the command gave nothing for {access.retry_seconds:g} s (data.retry_seconds), and was ended"
            raise StorageError(f"{pipe}: {silent}: {last_line}" if last_line else f"{pipe}: {silent}")
        if not 0 < done.code < _NOT_RUN:
            raise StorageError(
                f"{pipe}: the command could not be run to its end, code {done.code}: {last_line}; the machine is at fault and "
                "not the data: mend that and go on"
            )
        raise FileNotFoundError(2, f"the command ended with code {done.code}: {last_line}", str(pipe))

    def _run(self, pipe: Url, access: Access) -> Ended:
        return run_command(pipe.removeprefix(PIPE), self._file, access.retry_seconds, access.cancelled)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, start)

    def invalidate(self, start: int, size: int) -> bool:
        return False

    def close(self) -> None:
        self._file.close()


def fetch(url: Url, start: int, size: int | None, access: Access) -> bytes:
    """Read `size` bytes from `start` of a remote file, or all of it if `size` is None, with retries.

    Raises:
        StorageError: the bytes did not arrive in time, or the server refuses them.
        FileNotFoundError: there is no such file.
        OSError: the file ends before these bytes.
    """
    system, path = _file_system(url, access)
    byte_range = {} if size is None else {"start": start, "end": start + size}
    started, attempts, wrong_answers, pause = time.monotonic(), 0, 0, _FIRST_PAUSE
    while True:
        # One attempt. An answer of the wrong length counts as a failure, and after several as final.
        attempts += 1
        try:
            data = system.cat_file(path, **byte_range)
            if size is None or len(data) == size:
                return data
            problem = f"the answer to a request for {size} bytes had {len(data)}"
            # A server that ignores ranges, or a login page, answers even a request for one byte with more.
            is_no_range = len(data) > size or len(system.cat_file(path, start=start, end=start + 1)) > 1
            wrong_answers += 1
            if wrong_answers == _MAX_WRONG_ANSWERS:
                if is_no_range:
                    raise StorageError(
                        f"{url}: {problem}, {wrong_answers} times; its server, or what is before it, ignores ranges"
                    )
                raise OSError(f"{url}: {problem}, {wrong_answers} times; the file is cut")
        except Exception as error:  # every file system of fsspec raises its own kinds
            if wrong_answers == _MAX_WRONG_ANSWERS or _is_final(error):
                raise _final(error, url) from None
            problem = masked_text(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__

        # Wait, unless the time is over or the reader was closed.
        if time.monotonic() - started + pause > access.retry_seconds:
            raise StorageError(
                f"{url}: not read in {access.retry_seconds:g} s (data.retry_seconds), {attempts} attempts; {problem}"
            )
        if access.cancelled is None:
            time.sleep(pause)
        elif access.cancelled.wait(pause):
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
    if isinstance(error, OSError) and not isinstance(error, PermissionError):
        return error
    return StorageError(f"{url}: {masked_text(str(error))}")


_open_systems: dict[tuple[int, str, float], Any] = {}


def _file_system(url: Url, access: Access) -> tuple[Any, str]:
    """Get fsspec's file system for a URL, and the path in it. It is cached by process, because its threads do not survive a
    fork."""
    import fsspec

    # Long enough for a busy server, short enough to leave time for retries.
    silent_seconds = min(_SILENT_SECONDS, max(1.0, access.retry_seconds / 4))
    key = (os.getpid(), url.scheme, silent_seconds)
    try:
        if key not in _open_systems:
            _open_systems[key] = fsspec.filesystem(url.scheme, **_options(url.scheme, silent_seconds))
        return _open_systems[key], _open_systems[key]._strip_protocol(url.raw)
    except ImportError as error:
        raise StorageError(f"{url}: {error}; {_remedy(url.scheme)}") from None
    except ValueError as error:
        raise StorageError(f"{url}: {masked_text(str(error))}; expected a folder, https://, http:// or s3://") from None


def _remedy(scheme: str) -> str:
    return "pip install 'selective-mtp[remote]'" if scheme in ("http", "https", "s3") else f"install what {scheme}:// needs"


def _options(scheme: str, silent_seconds: float) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    # aiohttp's default would wait five minutes for a silent connection.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silent_seconds)
    return {"client_kwargs": {"timeout": timeout}}
