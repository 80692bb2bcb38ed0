"""Lines of plain and compressed text files, in bounded memory.

A line longer than a limit is skipped chunk by chunk, so that neither a file without line ends nor a decompression bomb can
fill the memory. A compressed file that was cut is an error, and not just a shorter file.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from pipeline.data.corpus.columns import require
from pipeline.data.corpus.inputs import Span
from pipeline.data.errors import DataError

_CHUNK = 1 << 20


def lines_of(file: BinaryIO, span: Span, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (position, line) of the decompressed lines of a span; None instead of a line of more than `limit` bytes.

    A span of a .jsonl has the lines that begin in it. Positions are bytes, in a compressed file those after decompression.

    Raises:
        DataError: the compressed file is damaged.
    """
    if span.kind == ".jsonl":
        position = _skip_begun_line(file, span.start)
        return _lines(file, limit, position, span.end)
    return _decompressed_lines(file, span, limit)


def _decompressed_lines(file: BinaryIO, span: Span, limit: int) -> Iterator[tuple[int, bytes | None]]:
    try:
        if span.kind == ".jsonl.gz":
            with gzip.open(file) as stream:
                yield from _lines(stream, limit)  # type: ignore[arg-type]
        else:
            yield from _lines(io.BufferedReader(_ZstdStream(file), _CHUNK), limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{span.path} is damaged: {error}; copy it again") from None


def _skip_begun_line(file: BinaryIO, start: int) -> int:
    """Seek to the first line that begins at or after `start`; returns its position."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
        pass
    return file.tell()


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


class _ZstdStream(io.RawIOBase):
    """A decompressed .zst file, as a raw stream. zstandard's own stream reader accepts a cut file as complete; this one raises
    EOFError."""

    # In bytes. A frame can expand by a factor of 30,000, so little is decompressed at once.
    _INPUT = 1024

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
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None


def line_name(span: Span, number: int) -> Callable[[], str]:
    """Name line `number` (from 1) of a span in messages, by its number in the file."""

    def name() -> str:
        # Counting the lines before the span is slow, so it is done only for the few lines that a message names.
        return f"{span.path}, line {number + (_lines_before(span) if span.start else 0)}"

    return name


def _lines_before(span: Span) -> int:
    with open(span.path, "rb") as file:
        remaining, newlines = span.start, 0
        while remaining and (data := file.read(min(_CHUNK, remaining))):
            newlines += data.count(b"\n")
            remaining -= len(data)
        file.seek(span.start - 1)
        return newlines + (file.read(1) != b"\n")
