"""What the tokenizers library prints where its code panics, kept from standard error.

A panic becomes an exception, and that a message or a count (`encoding`). But the library's runtime prints lines of its own
first, twice for every such text, and nothing tells it not to. So while documents are tokenised the standard error of the
process, and of the workers that it starts, is a file. What is there beside panics is shown at the end.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_STANDARD_ERROR = 2
_PANIC = re.compile(
    rb"\n?thread '[^'\n]*'(?: \(\d+\))? panicked at [^\n]*\n[^\n]*\n(?:note: run with `RUST_BACKTRACE=1`[^\n]*\n)?"
)
# So much is looked at, in bytes: 50,000 panics. Whatever else is written comes earlier.
_LONGEST = 1 << 24


@contextmanager
def without_panics() -> Iterator[None]:
    """Keep what is written to standard error in the block from it, and show at its end what is no panic."""
    # A text on which the library panics has no stack that would help a user.
    os.environ["RUST_BACKTRACE"] = "0"
    try:
        real = os.dup(_STANDARD_ERROR)
        kept = tempfile.TemporaryFile()  # noqa: SIM115 (closed at the end of the block)
    except OSError:  # a full disk, or no standard error at all: better its lines than no work
        yield
        return
    sys.stderr.flush()
    os.dup2(kept.fileno(), _STANDARD_ERROR)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, _STANDARD_ERROR)
        os.close(real)
        with kept, open(_STANDARD_ERROR, "wb", closefd=False) as error:
            _show_others(kept, error)


def _show_others(kept: BinaryIO, error: BinaryIO) -> None:
    kept.seek(0)
    error.write(_PANIC.sub(b"", kept.read(_LONGEST)))
