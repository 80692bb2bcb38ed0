"""The curves of a run directory, as TensorBoard itself reads them from its event files."""

import logging
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events_of(run_dir: Path, run: str = "") -> Any:
    """A run of a run directory's event files."""
    # It says of every start after a kill that it drops points, which is what is looked at here.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run_dir / "tensorboard" / run), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return events.Reload()


def scalars(run_dir: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """{(run, tag): [(step, value), ...]}; the run itself is ""."""
    folder = run_dir / "tensorboard"
    runs = {path.parent.relative_to(folder).as_posix().removeprefix(".") for path in folder.rglob("events.*")}
    found = {run: events_of(run_dir, run) for run in sorted(runs)}
    return {
        (run, tag): [(event.step, event.value) for event in events.Scalars(tag)]
        for run, events in found.items()
        for tag in events.Tags()["scalars"]
    }
