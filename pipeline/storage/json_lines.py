"""Files of one JSON object a line, which a kill or a loss of power may leave with a torn line.

A line is whole once its line break is there. A torn one is followed by another line only where a later process wrote on, which
first ends it (`end_torn_line`).
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A line of a file. number: from 1. value: its object; None of a line that is torn or damaged."""

    number: int
    value: dict[str, Any] | None


def read_json_lines(path: Path) -> list[Line]:
    """Read all lines, damaged ones included; an empty list if there is no file."""
    *whole, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    lines = [Line(number, _object(line)) for number, line in enumerate(whole, 1)]
    return [*lines, Line(len(lines) + 1, None)] if last else lines


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def end_torn_line(path: Path) -> None:
    """End a last line that has no line break, so that what is appended begins a line of its own."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
