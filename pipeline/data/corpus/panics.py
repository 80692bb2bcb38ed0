"""What the tokenizers library prints where its code panics, kept from standard error.

A panic becomes an exception, and that a message or a count (`encoding`). But the library's runtime prints lines of its own
first, twice for every such text, and nothing tells it not to. So while documents are tokenised the standard error of the
process, and of the workers that it starts, is a pipe, from which all other lines are passed on as they come.
"""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_STANDARD_ERROR = 2
_PANIC = re.compile(rb"thread '[^'\n]*'(?: \(\d+\))? panicked at [^\n]*\n")
_NOTE = b"note: run with `RUST_BACKTRACE=1`"
_SECONDS_TO_PASS_ON = 10.0


@contextmanager
def without_panics() -> Iterator[None]:
    """Pass on what is written to standard error in the block, without panics."""
    # A text on which the library panics has no stack that would help a user.
    os.environ["RUST_BACKTRACE"] = "0"
    try:
        real = os.dup(_STANDARD_ERROR)
        source, sink = os.pipe()
    except OSError:  # no standard error, or no more files: better its lines than no work
        yield
        return

    # A process of the block may live on and keep the pipe open, so that its end is a line that nobody else writes.
    last = f"{os.urandom(16).hex()}\n".encode()
    passing_on = threading.Thread(target=_pass_on, args=(source, real, last), daemon=True)
    passing_on.start()
    sys.stderr.flush()
    os.dup2(sink, _STANDARD_ERROR)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, _STANDARD_ERROR)
        os.write(sink, last)
        os.close(sink)
        passing_on.join(_SECONDS_TO_PASS_ON)


def _pass_on(source: int, real: int, last: bytes) -> None:
    with open(source, "rb") as lines, open(real, "wb", buffering=0) as error:
        for line in _without_panics(lines, last):
            error.write(line)


def _without_panics(lines: BinaryIO, last: bytes) -> Iterator[bytes]:
    """Yield the lines before `last` but those of a panic: an empty one, its place, its message, and a note after the first."""
    held_back = b""
    for line in iter(lines.readline, b""):
        if _PANIC.match(line):
            lines.readline()
            held_back = b""
            continue
        if line.startswith(_NOTE):
            continue
        yield held_back
        held_back = b""
        # A last line that was not ended has the end's line behind it.
        if line.endswith(last):
            yield line.removesuffix(last)
            return
        if line == b"\n":
            held_back = line
        else:
            yield line
