"""The events of a run, a JSON object a line in `events.jsonl`, by which `launch/audit.py` knows what has happened.

metrics.jsonl holds the line of steps that the run has ended up with. Here nothing is ever cut away, so that work which was
done twice can be found. Every line has `time` (seconds since 1970) and `event`:

    start       a job begins: `began` (its process), `ranks`, `host`
    order       the order of samples (`data.loading.order_record`), where it is not the last one written
    resume      training goes on from `step`, `samples`; 0 in a new run. `skipped`: the stretches of rows that are left out
    step        `step` is done: `samples` so far, `digest` of its samples over all ranks, `waited` seconds for data;
                `applied` false if it was discarded, `logged` true if metrics.jsonl has it
    validation, save    `seconds` in which training stood still for it, after `step`; `saved`: the checkpoint that was completed
    end         the job ends with `code`, or with `error`; after a kill it is missing

The first rank writes; its clock counts. A line is written by one call, so that a kill leaves it whole or absent.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.runtime.preemption import EXIT_TRY_AGAIN, StoppedError
from pipeline.storage.json_lines import end_torn_line, read_json_lines
from pipeline.storage.whole_file import naming

EVENTS_FILE = "events.jsonl"
OF_REFERENCE = Path("reference") / "training"
"""Where in a run directory the reference has its own that the run trains."""

# Where this process has begun a job and not ended it in good order, the inner one last: a reference is trained within a job.
_begun: list[Path] = []


class EventLog:
    """Appends events to those of a run directory. run_dir: None to write nothing, on all ranks but the first."""

    def __init__(self, run_dir: Path | None):
        self._path = None if run_dir is None else run_dir / EVENTS_FILE
        self._descriptor: int | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self._path):
                end_torn_line(self._path)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, event: str, **values: Any) -> None:
        """Append an event; `values` are JSON values."""
        if self._descriptor is None or self._path is None:
            return
        line = json.dumps({"time": round(time.time(), 4), "event": event} | values, separators=(",", ":"))
        with naming(self._path):
            os.write(self._descriptor, f"{line}\n".encode())

    @contextmanager
    def timed(self, event: str, step: int) -> Iterator[dict[str, Any]]:
        """Write an event after the block, with the seconds that it took; what the block puts into the dictionary goes along."""
        values: dict[str, Any] = {}
        started = time.perf_counter()
        yield values
        self.write(event, step=step, seconds=round(time.perf_counter() - started, 4), **values)

    def sync(self) -> None:
        """Have on the disk what was written so far."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def last_event(run_dir: Path, event: str) -> dict[str, Any] | None:
    """Return the last event of this kind that is recorded of a run; None if there is none."""
    lines = reversed(read_json_lines(run_dir / EVENTS_FILE))
    return next((line.value for line in lines if line.value is not None and line.value.get("event") == event), None)


@contextmanager
def begun_and_ended(run_dir: Path | None, began: float, ranks: int) -> Iterator[dict[str, Any]]:
    """Write the start of a job, and after the block its end: with the exit code that the block puts into the dictionary as
    `code`, or the class of an error. began: time of the start of its process."""
    events = EventLog(run_dir)
    if run_dir is not None:
        _begun.append(run_dir)
    events.write("start", began=round(began, 4), ranks=ranks, host=socket.gethostname())
    outcome: dict[str, Any] = {}
    is_in_order = True
    try:
        yield outcome
    except StoppedError:
        events.write("end", code=EXIT_TRY_AGAIN)
        raise
    except BaseException as error:
        # It may be one that a lost peer has caused, whose code is then known a little later.
        is_in_order = False
        events.write("end", error=type(error).__name__)
        raise
    else:
        events.write("end", **outcome)
    finally:
        if is_in_order and run_dir is not None:
            _begun.remove(run_dir)
        events.close()


def note_end(code: int, seconds: float) -> None:
    """Write the end of every job that was begun, or give up after `seconds`: the process is about to end by `os._exit`.

    A disk that does not answer may be what the job hangs on, so it is written by a thread of its own.
    """
    thread = threading.Thread(target=_note_end, args=(code,), daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def _note_end(code: int) -> None:
    with suppress(OSError):
        for run_dir in reversed(_begun):
            events = EventLog(run_dir)
            events.write("end", code=code)
            events.close()


def time_of_start() -> float:
    """Time at which this process began, in seconds since 1970; the present where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
