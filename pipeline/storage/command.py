"""Runs the command of a pipe, for as long as it gives something and somebody waits for it."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from typing import IO, NamedTuple

_POLL_SECONDS = 0.2


class Ended(NamedTuple):
    """code: as the shell has it; negative for a signal; None if the command was ended, because it gave nothing any more or
    because nobody wanted it. errors: what it wrote to its standard error."""

    code: int | None
    errors: str


def run_command(command: str, output: IO[bytes], silent_seconds: float, cancelled: threading.Event | None = None) -> Ended:
    """Run a command of the shell with its output in a file, from the file's beginning.

    silent_seconds: once its output has not grown for so long it is ended, with all processes of its group. cancelled: ends it
    as well.
    """
    output.seek(0)
    output.truncate()
    with tempfile.TemporaryFile() as errors:
        # A group of its own, so that all that the shell has started can be ended.
        process = subprocess.Popen(command, shell=True, stdout=output, stderr=errors, process_group=0)
        try:
            code = _wait(process, output.fileno(), silent_seconds, cancelled)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        return Ended(code, errors.read().decode(errors="replace"))


def _wait(
    process: "subprocess.Popen[bytes]", output: int, silent_seconds: float, cancelled: threading.Event | None
) -> int | None:
    size, grown = 0, time.monotonic()
    while not (cancelled is not None and cancelled.is_set()):
        try:
            return process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            now, size_now = time.monotonic(), os.fstat(output).st_size
        if size_now != size:
            size, grown = size_now, now
        elif now - grown > silent_seconds:
            return None
    return None
