"""Conduct an experiment from its plan to its results; run again it goes on where it was."""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.experiment.measuring import measure_acceptance, measure_speed
from pipeline.experiment.page import machine, page
from pipeline.experiment.plan import Plan, RunName, keep_plan, settings_of, stage_one, stage_two
from pipeline.experiment.preparing import clean_share, prepare
from pipeline.experiment.results import Figures, best_rates, collect, run_figures, runs_to_decode
from pipeline.experiment.runs import StoppedOnRequestError, places, run_all, training
from pipeline.experiment.selections import compare_selections
from pipeline.storage.locks import take_lock
from pipeline.storage.whole_file import write_file

_LONGEST_PREPARATION = 12 * 3600.0


def conduct(plan: Plan, directory: Path, workers: int | None = None) -> Figures:
    """Make what is missing, run both stages, write results.json and index.html; returns the results.

    Several programs may work on one folder, the tasks of a Slurm array: each run has a lock, and each program waits for what
    the others run.
    """
    directory = directory.absolute()
    keep_plan(plan, directory)
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    try:
        results = _conduct(plan, directory, places(workers))
    finally:
        # Hours of this start alone would mislead where it went on from another.
        hours = _add_hours(directory, (time.monotonic() - started) / 3600)
    results |= {"hours": round(hours, 3), "machine": machine()}
    write_file(directory / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_file(directory / "index.html", page(results).encode())
    return results


def _conduct(plan: Plan, directory: Path, slots: Sequence[dict[str, Any]]) -> Figures:
    with (directory / "prepare.lock").open("a") as lock:
        take_lock(lock, wait=_LONGEST_PREPARATION)
        prepare(plan, directory, slots, _say)
    first = _run_stage(plan, stage_one(plan), directory, slots)
    second = _run_stage(plan, stage_two(plan, best_rates(plan, first)), directory, slots)
    runs, rates = first | second, best_rates(plan, first)
    with (directory / "measure.lock").open("a") as lock:
        take_lock(lock, wait=_LONGEST_PREPARATION)
        speed = measure_speed(plan, directory, slots, _say)
        accepted = measure_acceptance(runs_to_decode(plan, rates, runs), directory, slots, _say)
    results = collect(plan, directory, runs, speed, accepted)
    _say("comparing selections")
    results["selections"] = compare_selections(plan, directory, rates)
    return results


def _run_stage(plan: Plan, runs: Sequence[RunName], directory: Path, slots: Sequence[dict[str, Any]]) -> dict[RunName, Figures]:
    works = []
    for run in runs:
        over_time = clean_share(plan, directory, run) if plan.arms[run.arm].clean_share else None
        works.append(training(directory, str(run), settings_of(plan, run, directory, over_time)))
    run_all(works, directory, slots, _say)
    return {run: run_figures(plan, run, directory) for run in runs}


def _add_hours(directory: Path, hours: float) -> float:
    """Add the hours of this start to those before it."""
    file = directory / "hours.json"
    try:
        before = float(file.read_text())
    except (OSError, ValueError):
        before = 0.0  # there is none yet, or it is damaged: the results do not depend on it
    write_file(file, json.dumps(before + hours).encode())
    return before + hours


def _stop(signal_number: int, frame: Any) -> None:
    raise StoppedOnRequestError


def _say(message: str) -> None:
    print(message, flush=True)
