"""Checks of checkpoints: every byte is read, as loading does, and held against state.json and the line of steps."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.audit.history import History
from pipeline.runtime.checkpoint.folders import ABANDONED, PARTIAL, problem_of, read_state_of, saved_steps, step_name
from pipeline.runtime.checkpoint.state import State


class CheckpointReport(NamedTuple):
    """A folder of checkpoints/. kind: `checkpoint`, `abandoned` or `unfinished`. ranks: of the job that wrote it; None where
    it is not known. problems: none if it is sound."""

    name: str
    kind: str
    ranks: int | None
    num_bytes: int
    problems: list[str]


def check_checkpoints(run_dir: Path, history: History) -> list[CheckpointReport]:
    """Look at all folders, newest checkpoints first. Of abandoned and unfinished ones nothing is expected."""
    directory = run_dir / "checkpoints"
    steps = saved_steps(directory)
    reports = [_report(directory / name, history) for name in map(step_name, steps)]
    last = _last_saved(history)
    if last is not None and last > max(steps, default=-1):
        gone = f"{step_name(last)}: was saved, and neither it nor a later one is there"
        reports.insert(0, CheckpointReport(step_name(last), "checkpoint", None, 0, [gone]))
    for path in sorted(directory.glob(f"{ABANDONED}*"), reverse=True):
        state, _ = read_state_of(path)
        reports.append(CheckpointReport(path.name, "abandoned", state.world_size if state else None, _size_of(state), []))
    for path in sorted(directory.glob(f"step-*{PARTIAL}")):
        reports.append(CheckpointReport(path.name, "unfinished", None, 0, []))
    return reports


def _last_saved(history: History) -> int | None:
    """The step of the newest checkpoint that the events of the line tell of; None if they tell of none."""
    saved = [event.values.get("saved") for event in history.events if event.kind == "save" and not event.abandoned]
    names = [str(each.get("name")).removeprefix("step-") for each in saved if isinstance(each, dict)]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _report(path: Path, history: History) -> CheckpointReport:
    state, problem = read_state_of(path)
    if state is None:
        return CheckpointReport(path.name, "checkpoint", None, 0, [problem])
    found = [f"{path.name}: {each}" for file in state.files if (each := problem_of(path, file)) is not None]
    found += _contradictions(path.name, state, history)
    return CheckpointReport(path.name, "checkpoint", state.world_size, _size_of(state), found)


def _contradictions(name: str, state: State, history: History) -> Iterator[str]:
    """List what a checkpoint says of itself and the events deny."""
    if not history.events or state.step == 0:
        return
    event = history.line.get(state.step)
    if event is None:
        yield f"{name}: no event tells of step {state.step}"
        return
    samples, known = state.progress.get("samples"), event.values["samples"]
    if samples != known:
        yield f"{name}: stands at sample {samples}, and the events say {known}"
    skipped, left_out = _lists(state.progress.get("skipped") or ()), _lists(event.skipped)
    if skipped != left_out:
        yield f"{name}: leaves out the rows {skipped}, and the events say {left_out}"
    data = history.orders[event.order].get("data") if event.order >= 0 else None
    if data is not None and state.identity.get("data") != data:
        yield f"{name}: was trained on other data than the events say"


def _lists(stretches: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(stretch) for stretch in stretches]


def _size_of(state: State | None) -> int:
    return 0 if state is None else sum(file.bytes for file in state.files)
