"""Write metrics to metrics.jsonl and to trackers, of which TensorBoard is one. First rank only.

Trackers get the records of metrics.jsonl. When a run resumes, records after its checkpoint are dropped from metrics.jsonl and
TensorBoard, because those steps are trained again.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TextIO

from pipeline.config import Settings
from pipeline.runtime.event_files import EventFiles
from pipeline.runtime.metrics import Record
from pipeline.runtime.sample_log import append_samples, cut_samples, samples_text
from pipeline.runtime.wandb_run import WandbRun
from pipeline.storage.json_lines import read_json_lines
from pipeline.storage.whole_file import naming, write_file

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """A place besides metrics.jsonl that is given each record."""

    def write(self, record: Record) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Logbook:
    """Writer of one run directory's metrics.

    first_step: the step resumed from; 0 is a new run, which keeps no old record. notes: what was wrong with the file, or is
    lost of it, a sentence each. validated: names of the held-out sets whose losses at `first_step` are there.
    held_out: names of the held-out sets; "" for an only one. trackers: further ones than TensorBoard.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        num_heads: int,
        held_out: Sequence[str] = ("",),
        trackers: Sequence[Tracker] = (),
    ):
        # Cut metrics.jsonl to the checkpoint; TensorBoard's files are cut as they are opened.
        path = run_dir / METRICS_FILE
        records, num_damaged = _read(path)
        kept = [record for record in records if 0 < first_step >= record["step"]]
        self.notes = _notes(records, num_damaged, first_step)
        of_step = [record for record in kept if record["step"] == first_step and record.get("split") == "validation"]
        self.validated = {str(record.get("set", "")) for record in of_step}
        write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.file: TextIO = path.open("a", encoding="utf-8")
        self.samples_path = cut_samples(run_dir, first_step)
        self.passages = run_dir / "passages"
        for path in self.passages.glob("step-*"):
            if not path.stem.removeprefix("step-").isdecimal() or int(path.stem.removeprefix("step-")) > first_step:
                path.unlink()
        self.board = EventFiles(run_dir / "tensorboard", first_step, num_heads, tuple(held_out))
        self.trackers: list[Tracker] = [self.board, *trackers]

    def write(self, record: Record) -> None:
        """Append a record to metrics.jsonl, and give it to the trackers."""
        with naming(Path(self.file.name)):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.write(record)

    def write_passage(self, step: int, html: str, png: bytes) -> None:
        """Keep a coloured passage in the run's folder, and show it as an image in TensorBoard."""
        self.passages.mkdir(exist_ok=True)
        write_file(self.passages / f"step-{step:08d}.html", html.encode())
        write_file(self.passages / f"step-{step:08d}.png", png)
        self.board.write_png("selection/passage", png, step)

    def sync(self) -> None:
        """Have on the disk what was written so far."""
        for tracker in self.trackers:
            tracker.sync()
        os.fsync(self.file.fileno())

    def write_samples(self, step: int, samples: Sequence[Record]) -> None:
        """Append samples to samples.jsonl, and show them as a text in TensorBoard."""
        append_samples(self.samples_path, samples)
        self.board.write_text("samples", samples_text(samples), step)

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def trackers_of(settings: Settings, run_dir: Path, first_step: int) -> list[Tracker]:
    """Begin, or continue, the trackers that the settings ask for besides TensorBoard."""
    return [] if settings.logging.wandb is None else [WandbRun(settings, run_dir, first_step)]


def read_records(run_dir: Path) -> list[Record]:
    """Read metrics.jsonl; lines that a kill or a loss of power left damaged are skipped."""
    return _read(run_dir / METRICS_FILE)[0]


def _read(path: Path) -> tuple[list[Record], int]:
    """(the records of a metrics.jsonl, the number of lines that are none)."""
    records = [line.value for line in read_json_lines(path)]
    whole = [record for record in records if record is not None and isinstance(record.get("step"), int)]
    return whole, len(records) - len(whole)


def _notes(records: Sequence[Record], num_damaged: int, first_step: int) -> list[str]:
    """Say what a start from `first_step` drops or misses of the records that are there."""
    last = max((record["step"] for record in records), default=0)
    notes = []
    if num_damaged:
        notes.append(f"{METRICS_FILE}: {num_damaged} damaged line(s) left out")
    if last > first_step:
        notes.append(f"{METRICS_FILE}: cut to step {first_step}, where the run continues; it went on to step {last}")
    if 0 < last < first_step:
        notes.append(
            f"{METRICS_FILE}: ends at step {last}, before the checkpoint of step {first_step}: what lay between is lost"
        )
    return notes


def without_non_finite(record: Record) -> Record:
    """Replace non-finite values by None, because JSON has no NaN."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
