"""Measure what the training runs do not tell: each arm's speed on a machine that does nothing else, and the tokens that a step
of self-speculative decoding accepts.

Both come after all runs, once. One program of several measures, while the others wait.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.experiment.corpus import CLEAN_SOURCES
from pipeline.experiment.plan import Plan, RunName, settings_of
from pipeline.experiment.runs import Work, run_all, training
from pipeline.runtime.logbook import read_records

_DECODED_ROWS = 32
"""Documents of each source that are continued."""


def measure_speed(plan: Plan, directory: Path, slots: Sequence[dict[str, Any]], say: Callable[[str], None]) -> dict[str, float]:
    """Train each arm for a few steps with nothing beside it; returns tokens per second by arm.

    The arms are trained as in the experiment, with what was computed beforehand (a reference's losses) read along.
    """
    run_all([_timing(plan, directory, arm) for arm in plan.arms], directory, slots[:1], say)
    tokens_a_step = plan.base["data"]["global_batch"] * plan.corpus.sequence_length
    return {arm: tokens_a_step / _seconds_a_step(directory, arm) for arm in plan.arms}


def _timing(plan: Plan, directory: Path, arm: str) -> Work:
    settings = settings_of(plan, RunName(arm, plan.learning_rates[0], 0), directory)
    over_time: dict[str, Any] = {"k_percent": plan.base["training"]["k_percent"]} if plan.arms[arm].clean_share else {}
    name = f"timing-{arm}"
    quiet = settings.with_values(
        run={"name": name},
        data={"validation_path": None},
        training={"steps": plan.timing_steps} | over_time,
    )
    return training(directory, name, quiet)


def _seconds_a_step(directory: Path, arm: str) -> float:
    """The median over the logged steps but the first, which has what happens once."""
    records = [record for record in read_records(directory / "runs" / f"timing-{arm}") if "split" not in record]
    return statistics.median(record["seconds_per_step"] for record in records[1:] or records)


def measure_acceptance(
    runs: Sequence[RunName], directory: Path, slots: Sequence[dict[str, Any]], say: Callable[[str], None]
) -> dict[RunName, float]:
    """Continue held-out documents of each clean source with every run's model, by drafts of heads 1… that head 0 verifies.

    Returns:
        The tokens that a step adds, head 0's own included, the mean over the sources.
    """
    run_all([_decoding(run, directory) for run in runs], directory, slots, say)
    return {run: _accepted(_figures_file(directory, run)) for run in runs}


def _decoding(run: RunName, directory: Path) -> Work:
    file = _figures_file(directory, run)
    file.parent.mkdir(exist_ok=True)
    number = str(_DECODED_ROWS)
    arguments = ["evaluate.py", str(directory / "runs" / str(run)), "--rows", number, "--drafts", number, "--json", str(file)]
    for name in CLEAN_SOURCES:
        arguments += ["--data", str(directory / "data" / "corpus" / "validation" / name)]
    return Work(f"decode-{run}", arguments, file.is_file)


def _figures_file(directory: Path, run: RunName) -> Path:
    return directory / "decoding" / f"{run}.json"


def _accepted(file: Path) -> float:
    folders: Mapping[str, Mapping[str, float]] = json.loads(file.read_text())["folders"]
    return statistics.fmean(found["accepted_per_step"] for found in folders.values())
