"""Lines of plain and compressed text files, in bounded memory.

A line longer than a limit is skipped chunk by chunk, so that neither a file without line ends nor a decompression bomb can
fill the memory. A compressed file that was cut is an error, and not just a shorter file.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.data.corpus.columns import require
from pipeline.data.corpus.decoding import damaged
from pipeline.data.corpus.inputs import Span

_CHUNK = 1 << 20
_BUFFER = 1 << 16
# How cuts of a .jsonl are found: see `_own_bytes`. Two spans look into a window, so at most a sixteenth is read twice.
_STEP_PER_WINDOW = 32
_FIRST_LOOK = 512


def lines_of(file: BinaryIO, span: Span, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (position, line) of the decompressed lines of a span; None instead of a line of more than `limit` bytes.

    Args:
        file: that of the span; a .jsonl is open without a buffer, so that no more than the span is read of it.
        span: a .jsonl's or a compressed file's. Of a .jsonl it has the lines of `_own_bytes`.
        limit: bytes of a line, its end not counted.

    Positions are bytes, in a compressed file those after decompression.

    Raises:
        DataError: the compressed file is damaged.
    """
    if span.kind == ".jsonl":
        start, end = _own_bytes(file, span)
        if start < end:
            # What was written to the file since it was listed completes its last line.
            section = _Section(file, start, None if end == span.file_size else end)
            yield from _lines(io.BufferedReader(section, _BUFFER), limit, start, end)
    else:
        yield from _decompressed_lines(file, span, limit)


def _own_bytes(file: BinaryIO, span: Span) -> tuple[int, int]:
    """Find the bytes [start, end) of the lines of a span of a .jsonl; empty if it has none.

    A file is cut every `span.step` bytes, and a cut takes effect at the first line that begins within `step / _STEP_PER_WINDOW`
    bytes after it. If none does, there is no cut, and the span before it goes on. Every span finds the same cuts by itself, so
    each byte is read by one span only, apart from these windows, however long a line is.
    """
    start = _cut(file, span, span.start)
    if start is None:
        return span.start, span.start
    ends = (_cut(file, span, cut) for cut in range(span.end, span.file_size, span.step))
    return start, next((end for end in ends if end is not None), span.file_size)


def _cut(file: BinaryIO, span: Span, cut: int) -> int | None:
    """Find where the first line begins in the window after a cut."""
    if cut == 0:
        return 0
    # A line begins at the cut if a line ends on the byte before it.
    position, end = cut - 1, cut - 1 + max(1, span.step // _STEP_PER_WINDOW)
    size = _FIRST_LOOK
    while position < end:
        file.seek(position)
        data = file.read(min(size, end - position))
        if not data or (found := data.find(b"\n") + 1):
            return position + found if data else None
        position, size = position + len(data), 2 * size
    return None


def _decompressed_lines(file: BinaryIO, span: Span, limit: int) -> Iterator[tuple[int, bytes | None]]:
    try:
        if span.kind == ".jsonl.gz":
            with gzip.open(file) as stream:
                yield from _lines(stream, limit)  # type: ignore[arg-type]
        else:
            yield from _lines(io.BufferedReader(_ZstdStream(file), _CHUNK), limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(span.path, error) from None


def _lines(stream: BinaryIO, limit: int, position: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Yield (position, line) of the lines that begin before `end`."""
    while end is None or position < end:
        start, line = position, stream.readline(limit + 1)
        if not line:
            return
        position += len(line)
        # Skip the rest of a line that is too long.
        is_whole = len(line) <= limit or line.endswith(b"\n")
        while not is_whole and (rest := stream.readline(_CHUNK)):
            position += len(rest)
            if rest.endswith(b"\n"):
                break
        yield start, line if is_whole else None


class _Section(io.RawIOBase):
    """The bytes [start, end) of a file as a raw stream; without an `end` up to that of the file."""

    def __init__(self, file: BinaryIO, start: int, end: int | None) -> None:
        self._file = file
        self._left = None if end is None else end - start
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        got = self._file.readinto(memoryview(buffer)[:size])  # type: ignore[attr-defined]
        if self._left is not None:
            self._left -= got
        return int(got)


class _ZstdStream(io.RawIOBase):
    """A decompressed .zst file, as a raw stream. zstandard's own stream reader accepts a cut file as complete; this one raises
    EOFError."""

    # In bytes. A frame can expand by a factor of 30,000, so little is decompressed at once.
    _INPUT = 1024
    # In bytes: what `zstd --long=31` makes, as public dumps do, and the most that the library can read.
    _LONGEST_WINDOW = 1 << 31

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._zstandard = require("zstandard", "corpora", "reading .zst")
        self._frame: Any = None
        self._output = memoryview(b"")
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (data := self._file.read(self._INPUT)):
                if self._frame is not None:
                    raise EOFError("it ends within a compressed frame")
                return 0
            self._decompress(self._input or data)
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self, data: bytes) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor(max_window_size=self._LONGEST_WINDOW).decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
