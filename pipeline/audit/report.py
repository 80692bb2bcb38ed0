"""An audit as figures, and the figures as text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.audit.checkpoints import CheckpointReport, check_checkpoints
from pipeline.audit.history import History, read_history
from pipeline.audit.metrics import check_metrics
from pipeline.audit.samples import SampleReport, check_samples
from pipeline.audit.wall_clock import WallClock, wall_clock
from pipeline.runtime.events import OF_REFERENCE
from pipeline.runtime.table import aligned

_FIGURES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class Audit:
    """All that was found of a run. problems, notes: a sentence each; a run without a problem is sound."""

    run_dir: Path
    history: History
    samples: SampleReport
    checkpoints: list[CheckpointReport]
    clock: WallClock
    problems: list[str]
    notes: list[str]


def audit(run_dir: Path) -> Audit:
    """Read all that a run directory holds of its past; nothing is changed."""
    history = read_history(run_dir)
    samples = check_samples(history)
    problems, notes = check_metrics(run_dir, history)
    checkpoints = check_checkpoints(run_dir, history)
    of_checkpoints = [problem for each in checkpoints for problem in each.problems]
    return Audit(
        run_dir,
        history,
        samples,
        checkpoints,
        wall_clock(history, read_history(run_dir / OF_REFERENCE).events),
        [*history.problems, *samples.problems, *problems, *of_checkpoints],
        [*history.notes, *_notes_on_progress(history, checkpoints), *notes],
    )


def _notes_on_progress(history: History, checkpoints: list[CheckpointReport]) -> Iterator[str]:
    if len(history.orders) > 1:
        yield "the order of samples was changed on the way, so how often a sample was read is not counted"
    sound = [int(each.name.removeprefix("step-")) for each in checkpoints if each.kind == "checkpoint" and not each.problems]
    newest = max(sound, default=0)
    if history.last_step > newest:
        yield f"steps {newest + 1} to {history.last_step} are in no sound checkpoint: a start of now trains them again"


def figures(found: Audit) -> dict[str, Any]:
    """The audit as JSON values."""
    history = found.history
    return {
        "run": str(found.run_dir),
        "sound": not found.problems,
        "problems": found.problems,
        "notes": found.notes,
        "starts": [{"ranks": event.values["ranks"], "began": event.values["began"]} for event in history.starts],
        "exit_code": history.exit_code,
        "state": history.how_it_ended,
        "steps": history.last_step,
        "steps_abandoned": sum(event.abandoned for event in history.steps),
        "returns": [asdict(each) for each in history.returns],
        "samples": {
            "read": history.line[history.last_step].values["samples"] if history.line else 0,
            "left_out": [list(stretch) for stretch in history.left_out],
            "steps_verified": found.samples.verified,
            "sets": [each._asdict() for each in found.samples.sets],
        },
        "checkpoints": [
            each._asdict() | {"sound": not each.problems if each.kind == "checkpoint" else None} for each in found.checkpoints
        ],
        "wall_clock": {
            "seconds": found.clock.total,
            "by_kind": found.clock.seconds,
            "percent": found.clock.percent,
            "starting": found.clock.starting,
        },
    }


def text(values: dict[str, Any]) -> str:
    """Format the figures for the terminal."""
    parts = [
        _headline(values),
        *_samples(values),
        *_section("checkpoints", [_checkpoint_line(each) for each in values["checkpoints"]] or ["none"]),
        *_section(f"wall clock: {values['wall_clock']['seconds']:,.1f} s", _clock_lines(values["wall_clock"])),
        *_section("worth knowing", values["notes"]),
        *_section("NOT SOUND", values["problems"]),
    ]
    return "\n".join(parts if values["problems"] else [*parts, "sound"])


def _headline(values: dict[str, Any]) -> str:
    ranks = " → ".join(str(start["ranks"]) for start in values["starts"]) or "no"
    return f"{values['run']}: {values['steps']} steps in {len(values['starts'])} start(s) on {ranks} rank(s); {values['state']}"


def _samples(values: dict[str, Any]) -> Iterator[str]:
    steps, again, verified = values["steps"], values["steps_abandoned"], values["samples"]["steps_verified"]
    lines = [
        f"{values['samples']['read']:,} in {steps} steps, and {again} step(s) that were trained again later",
        f"{verified} of these {steps + again} had the samples of the order, each in its row",
    ]
    for return_ in values["returns"]:
        lines.append(_return_line(return_))
    for each in values["samples"]["sets"]:
        lines.append(
            f"{each['name'] or 'the data'}: {each['rows']:,} rows of {each['samples']:,} samples, {each['epochs']:.2f} epochs "
            f"({each['left_over_an_epoch']} left over in each); none was read more than {each['most']} time(s)"
            + (f"; {each['left_out']:,} left out on purpose" if each["left_out"] else "")
        )
    yield from _section("samples", lines)


def _return_line(values: dict[str, Any]) -> str:
    step, reached, left_out = values["step"], values["reached"], values["left_out"]
    if left_out is None:
        return f"went on from step {step} after step {reached}: {reached - step} step(s) abandoned"
    rows = f"rows {left_out[0]:,} to {left_out[1] - 1:,} left out on purpose"
    return f"went back from step {reached} to {step}, after a loss spike: {reached - step} step(s) abandoned, {rows}"


def _checkpoint_line(each: dict[str, Any]) -> str:
    if each["kind"] != "checkpoint":
        return f"{each['name']}: {each['kind']}"
    verdict = "sound" if each["sound"] else "; ".join(each["problems"])
    written = f", {_size(each['num_bytes'])} of {each['ranks']} rank(s)" if each["ranks"] else ""
    return f"{each['name']}: {verdict}{written}"


def _clock_lines(clock: dict[str, Any]) -> list[str]:
    rows = [
        [kind.replace("_", " "), f"{seconds:,.1f} s", f"{clock['percent'][kind]:.2f} %"]
        for kind, seconds in clock["by_kind"].items()
        if seconds or kind != "reference"
    ]
    return [*aligned(rows).splitlines(), f"(of the restarts {clock['starting']:,.1f} s were jobs that started)"]


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _size(num_bytes: int) -> str:
    unit = max((unit for unit, size in _FIGURES.items() if num_bytes >= size), key=_FIGURES.__getitem__, default="B")
    return f"{num_bytes / _FIGURES[unit]:.3g} {unit}"
