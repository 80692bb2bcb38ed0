"""Compare arms of an experiment: runs that differ only in their seeds are one arm, and arms are compared seed by seed.

A difference is that of two runs with the same seeds, on the same held-out rows, at the same step. Seeds are those of the model
and of the data; that of a random selection counts as well where an arm has runs that differ in it alone. The interval is
Student's:
with n pairs of mean difference d and standard deviation s, d ± t(0.975, n − 1) · s / √n covers the true difference in 95 of 100
repetitions, if the differences are about normal. One pair has no interval.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.report.errors import ReportError
from pipeline.report.run_files import Record, RunFiles, read_runs, run_directories
from pipeline.report.significance import paired_test
from pipeline.runtime.checkpoint.folders import read_state_of, saved_steps, step_name
from pipeline.runtime.events import OF_REFERENCE
from pipeline.runtime.identity import changed_settings
from pipeline.runtime.table import aligned

SEEDS = ("model.seed", "data.seed", "training.selection_seed")
_PLACES = ("data.path", "data.validation_path", "data.mixture", "data.builtin", "reference.path")


@dataclass(frozen=True)
class Compared:
    """A run to be compared. identity: as its newest checkpoint knows it, with fingerprints of data and models; without one
    its settings. batch: fingerprint of the held-out row by which checkpoints are checked; "" if unknown."""

    run: RunFiles
    identity: dict[str, Any]
    batch: str

    def values(self, seeds: Sequence[str] = SEEDS) -> tuple[Any, ...]:
        """The values of these seeds."""
        return tuple(self.identity.get(seed) for seed in seeds)


def compare(paths: Sequence[Path], allow_unlike: bool = False) -> dict[str, Any]:
    """Compare runs; the first one's arm is what the others are compared with.

    paths: run directories, or folders of run directories. allow_unlike: compare runs on unlike data all the same.

    Returns:
        The figures, as JSON values; `differences` are other arm minus first arm.

    Raises:
        ReportError: a path holds no run, data is unlike, there is only one arm, no two runs share seeds and a step, or they
            have no figure in common.
    """
    runs = [_compared(run) for run in read_runs(run_directories(paths))]
    unlike = [problem for other in runs[1:] for problem in _unlike(runs[0], other)]
    if unlike and not allow_unlike:
        raise ReportError("the runs' data is unlike; pass --allow-unlike to compare all the same:\n  " + "\n  ".join(unlike))
    arms = _arms(runs)
    step = _common_step(runs)
    differences = list(_differences(arms, step))
    if not any(each["mean"] is not None for each in differences):
        raise ReportError(
            f"after step {step} no held-out figure is known of both arms: their losses are not finite, or of unlike sets"
        )
    return {
        "step": step,
        "unlike": unlike,
        "unfinished": list(_unfinished(runs, step)),
        "arms": [_described(name, arm, arms[runs[0].run.name]) for name, arm in arms.items()],
        "differences": differences,
    }


def text(figures: Mapping[str, Any]) -> str:
    """Format the figures for the terminal: the arms, then a row for each arm and metric."""
    first, *others = figures["arms"]
    lines = [
        f"held-out figures after step {figures['step']}, and their differences from {first['name']}, seed by seed",
        "(means over the pairs; losses in nats a token; a negative difference is an improvement)",
    ]
    for arm in [first, *others]:
        what = "; ".join(arm["differs_in"]) or "the arm that others are compared with"
        paired = f", paired by {_listed(arm['paired_by'])}" if arm["paired_by"] else ""
        lines.append(f"  {arm['name']} ({len(arm['runs'])} run{'s' if len(arm['runs']) > 1 else ''}{paired}): {what}")

    rows = [["arm, figure", "pairs", first["name"], "arm", "difference", "95 % interval"]]
    rows += [_row(each) for each in figures["differences"]]
    notes = [*figures["unfinished"], *(f"unlike: {problem}" for problem in figures["unlike"])]
    if any(each["pairs"] == 1 for each in figures["differences"]):
        notes.append("a single pair of runs has no interval: how far seeds alone move a figure is not known")
    return "\n".join([*lines, "", aligned(rows), *notes])


def _row(each: Mapping[str, Any]) -> list[str]:
    label = f"{each['arm']}, {each['set']}{' ' if each['set'] else ''}{each['metric']}"
    if each["mean"] is None:
        return [label, str(each["pairs"]), "not finite in one of the runs", "", "", ""]
    interval = "–" if each["low"] is None else f"{each['low']:+.4f} to {each['high']:+.4f}"
    return [label, str(each["pairs"]), *(f"{each[name]:.4f}" for name in ("first", "other")), f"{each['mean']:+.4f}", interval]


def _compared(run: RunFiles) -> Compared:
    for step in saved_steps(run.path / "checkpoints"):
        state, _ = read_state_of(run.path / "checkpoints" / step_name(step))
        if state is not None:
            return Compared(run, dict(state.identity), state.held_out.batch)
    return Compared(run, dict(run.settings), "")


def _unlike(one: Compared, other: Compared) -> Iterator[str]:
    """Say in what two runs' data differs."""
    names = f"{one.run.name} and {other.run.name}"
    unknown = [each.run.name for each in (one, other) if not each.identity.get("data")]
    if unknown:
        yield f"{names}: no readable checkpoint of {' and '.join(unknown)}, so whether the training data is the same is unknown"
    elif one.identity["data"] != other.identity["data"]:
        yield f"{names}: other training data, by content"
    if one.identity.get("data.sequence_length") != other.identity.get("data.sequence_length"):
        yield f"{names}: other lengths of rows"
    if one.batch and other.batch and one.batch != other.batch:
        yield f"{names}: other held-out rows, by content"
    if _held_out_rows(one.run) != _held_out_rows(other.run):
        yield f"{names}: other held-out sets, or other numbers of their rows"


def _held_out_rows(run: RunFiles) -> dict[str, Any]:
    return {str(record.get("set", "")): record.get("rows") for record in run.validation}


def _arms(runs: Sequence[Compared]) -> dict[str, list[Compared]]:
    """Group runs that differ only in seeds, under the name of the first; {name: runs}."""
    arms: list[list[Compared]] = []
    for each in runs:
        same = next((arm for arm in arms if not _differs_in(arm[0], each)), None)
        arms.append([each]) if same is None else same.append(each)
    for arm in arms:
        twice = [each.run.name for each in arm if sum(other.values() == each.values() for other in arm) > 1]
        if twice:
            raise ReportError(
                f"{', '.join(twice)}: runs with the same settings and the same {_listed(SEEDS)}; name one of them"
            )
    if len(arms) < 2:
        raise ReportError("all runs have the same settings but for their seeds: there is nothing to compare")
    return {arm[0].run.name: arm for arm in arms}


def _described(name: str, arm: Sequence[Compared], first: Sequence[Compared]) -> dict[str, Any]:
    return {
        "name": name,
        "runs": [str(each.run.path) for each in arm],
        "differs_in": _differs_in(first[0], arm[0]),
        "paired_by": [] if arm is first else [*_paired_by(first, arm)],
    }


def _paired_by(first: Sequence[Compared], arm: Sequence[Compared]) -> Sequence[str]:
    """The seeds that two runs of a pair share: those of model and data where they tell the runs of each arm apart, since the
    selection's matters to a random selection alone."""
    are_told_apart = all(len({each.values(SEEDS[:2]) for each in runs}) == len(runs) for runs in (first, arm))
    return SEEDS[:2] if are_told_apart else SEEDS


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _differs_in(one: Compared, other: Compared) -> list[str]:
    """Settings and models, but not seeds and places, in which two runs differ, and that change a result."""
    changes = changed_settings(one.identity, other.identity)
    ours = all(_trained_by_itself(each) for each in (one, other))
    left_out = {*SEEDS, *_PLACES, "data", *(["reference model"] if ours else [])}
    return [f"{each.key} {each.before!r} → {each.after!r}" for each in changes if each.key not in left_out]


def _trained_by_itself(each: Compared) -> bool:
    """True if the run has trained its own reference, whose weights then follow from its seeds; also of a run that was moved."""
    path = each.identity.get("reference.path")
    return path is not None and Path(path).name == OF_REFERENCE.parent.name and (each.run.path / OF_REFERENCE).is_dir()


def _common_step(runs: Sequence[Compared]) -> int:
    """The last step at which all runs were validated; step 0, before any training, says nothing of them."""
    steps = [{record["step"] for record in each.run.validation} for each in runs]
    common = set.intersection(*steps) - {0}
    if not common:
        listed = "; ".join(f"{each.run.name} at {_shortened(sorted(of_run))}" for each, of_run in zip(runs, steps, strict=True))
        raise ReportError(
            f"there is no step after step 0 at which all of the runs were validated (logging.validation_every): {listed}"
        )
    return max(common)


def _shortened(steps: Sequence[int]) -> str:
    shown = [*steps] if len(steps) < 5 else [*steps[:2], "…", *steps[-2:]]
    return ", ".join(map(str, shown)) or "no step"


def _unfinished(runs: Sequence[Compared], step: int) -> Iterator[str]:
    """Say which runs the comparison falls short of, and on whose account."""
    last = {each.run.name: max(record["step"] for record in each.run.validation) for each in runs}
    longer = [name for name, of_run in last.items() if of_run > step]
    if longer:
        yield f"not compared at their end, which the others have not reached or not validated: {', '.join(longer)}"
    for each in runs:
        planned = each.run.settings.get("training.steps")
        if isinstance(planned, int) and last[each.run.name] < planned:
            yield f"{each.run.name} is not at its end: validated up to step {last[each.run.name]} of {planned}"


def _differences(arms: Mapping[str, list[Compared]], step: int) -> Iterator[dict[str, Any]]:
    first_name, first = next(iter(arms.items()))
    for name, arm in arms.items():
        if name == first_name:
            continue
        seeds = _paired_by(first, arm)
        by_seed = {each.values(seeds): each for each in first}
        pairs = [(by_seed[each.values(seeds)], each) for each in arm if each.values(seeds) in by_seed]
        if not pairs:
            raise ReportError(f"{first_name} and {name}: no two runs have the same {_listed(seeds)}")
        for set_name in first[0].run.sets:
            records = [tuple(_record(each, set_name, step) for each in pair) for pair in pairs]
            for metric in _metrics(records):
                values = [(a[metric], b[metric]) for a, b in records]
                yield {"arm": name, "set": set_name, "metric": metric} | _difference(values)


def _record(each: Compared, set_name: str, step: int) -> Record:
    found = [r for r in each.run.validation if r["step"] == step and str(r.get("set", "")) == set_name]
    return found[-1] if found else {}


def _metrics(records: Sequence[tuple[Record, ...]]) -> list[str]:
    """Losses of each head and bits per byte, where all records have the key."""
    names = [*(f"loss_head_{head}" for head in range(len(records[0][0]))), "bits_per_byte"]
    return [name for name in names if all(name in each for pair in records for each in pair)]


def _difference(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Mean difference of pairs (first, other), and its interval; None of all where a value is not finite."""
    known = [(first, other) for first, other in pairs if _is_number(first) and _is_number(other)]
    if len(known) < len(pairs):
        return {"pairs": len(pairs)} | dict.fromkeys(("first", "other", "mean", "low", "high"))
    firsts, others = zip(*known, strict=True)
    test = paired_test(others, firsts) if len(pairs) > 1 else None
    return {
        "pairs": len(pairs),
        "first": statistics.fmean(firsts),
        "other": statistics.fmean(others),
        "mean": statistics.fmean(other - first for first, other in known),
        "low": None if test is None else test.low,
        "high": None if test is None else test.high,
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
