"""metrics.jsonl against the line of steps: each logged step once, in order, at its place in the data."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.audit.history import History
from pipeline.storage.json_lines import read_json_lines

METRICS_FILE = "metrics.jsonl"


def check_metrics(run_dir: Path, history: History) -> tuple[list[str], list[str]]:
    """(problems, notes) of the metrics."""
    lines = read_json_lines(run_dir / METRICS_FILE)
    problems, notes = [], []
    steps: list[tuple[int, int, object]] = []
    for line in lines:
        step = None if line.value is None else line.value.get("step")
        if not isinstance(step, int) and line.number == len(lines):
            notes.append(f"{METRICS_FILE}: the last line is torn, as a kill leaves it")
        elif line.value is None or not isinstance(step, int):
            problems.append(f"{METRICS_FILE}: line {line.number} is damaged")
        elif "split" not in line.value:
            steps.append((line.number, step, line.value.get("samples")))

    problems += _problems_of_records(steps, history)
    logged = {step for step, event in history.line.items() if event.values["logged"]}
    lacking = sorted(logged - {step for _, step, _ in steps})
    if lacking:
        problems.append(f"{METRICS_FILE}: no record of step(s) {_listed(lacking)}, which the run has logged")
    beyond = [step for _, step, _ in steps if step > history.last_step]
    if beyond and history.line:
        notes.append(f"{METRICS_FILE}: goes to step {beyond[-1]}, beyond the last whole event; what is beyond is trained again")
    return problems, notes


def _problems_of_records(steps: list[tuple[int, int, object]], history: History) -> Iterator[str]:
    """Problems of the records of training, (line, step, samples) each."""
    before = 0
    for line, step, samples in steps:
        if step <= before:
            yield f"{METRICS_FILE}: line {line}: step {step} after step {before}: it is there twice, or out of order"
        before = max(before, step)
        event = history.line.get(step)
        if event is not None and event.values["samples"] != samples:
            yield f"{METRICS_FILE}: line {line}: step {step} stands at sample {samples}, expected {event.values['samples']}"
        if history.line and (step < 1 or (event is None and step < history.last_step)):
            yield f"{METRICS_FILE}: line {line}: step {step}, of which no event tells"
        elif event is not None and not event.values["logged"]:
            yield f"{METRICS_FILE}: line {line}: step {step}, which the run has not logged"


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown} and {len(numbers) - 12} more"
