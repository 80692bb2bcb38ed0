"""The figures of an experiment's runs, and what its comparisons say.

A run's figure is head 0's bits per byte of clean held-out text, the mean over the clean sources. Along the run it is compared
at equal tokens, at equal supervised pairs, at equal FLOPs and at equal time: each read off the run's curve, straight between
validations. FLOPs are given with and without the reference, which was run once for all arms; time is tokens over the arm's
speed alone on the machine, without the reference. The second figure is what a step of self-speculative decoding accepts.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.experiment.corpus import CLEAN_SOURCES, KIND_FILE, NOISE, SOURCES, labels
from pipeline.experiment.plan import Plan, RunName, settings_of
from pipeline.experiment.preparing import tokens_of
from pipeline.experiment.runs import CommandFailedError
from pipeline.flops import forward_flops, selective_flops
from pipeline.report.significance import holm, paired_test
from pipeline.runtime.logbook import read_records

Figures = dict[str, Any]
_STRETCHES = 10
_BUDGETS = ("tokens", "pairs", "flops", "flops_with_reference", "seconds")


def run_figures(plan: Plan, run: RunName, directory: Path) -> Figures:
    """The figures of one run: at its end, along it, and what it selected of each source.

    Raises:
        CommandFailedError: its records are incomplete.
    """
    records = read_records(directory / "runs" / str(run))
    steps = [record for record in records if "split" not in record]
    curve = _curve(plan, run, directory, records, steps)
    if not curve or curve[-1]["step"] != plan.steps:
        folder = directory / "runs" / str(run)
        raise CommandFailedError(
            f"{folder / 'metrics.jsonl'}: expected records up to step {plan.steps}, of which some are lost; remove {folder}: "
            "the same command trains it again"
        )
    heads = plan.base.get("model", {}).get("num_prediction_heads", 4)
    num_heads = settings_of(plan, run, directory).model.num_prediction_heads or heads
    last = [record for record in records if record.get("split") == "validation" and record["step"] == plan.steps]
    return {
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "bits_per_byte": curve[-1]["bits_per_byte"],
        "bits_per_byte_by_source": {record["set"]: record.get("bits_per_byte") for record in last},
        "losses": [statistics.fmean(record[f"loss_head_{head}"] for record in last) for head in range(num_heads)],
        "largest_gradient_norm": max(record["grad_norm"] for record in steps if record["grad_norm"] is not None),
        "trunk_gradient_norms": [_mean_of(steps, f"trunk_grad_norm_head_{head}") for head in range(num_heads)],
        "enrichment": _enrichment(steps, num_heads),
        "selected_by_source": _selected_by_source(steps, num_heads),
        "curve": curve,
    }


def _curve(plan: Plan, run: RunName, directory: Path, records: Sequence[Figures], steps: Sequence[Figures]) -> list[Figures]:
    """Bits per byte at each validation, with the tokens, pairs and FLOPs spent by then."""
    settings = settings_of(plan, run, directory)
    shape = settings.model.model_copy(update={"vocab_size": plan.corpus.vocab_size})
    keys_a_query = (settings.data.sequence_length + 1) / 2
    reference = forward_flops(shape, keys_a_query) if settings.reference.cached is not None else 0.0
    total = {"tokens": 0, "pairs": 0.0, "flops": 0.0, "flops_with_reference": 0.0}
    before, logged, spent = 0, [0], [dict(total)]
    for record in steps:
        # A logged step stands for those since the one before it.
        num_steps, tokens = record["step"] - before, record["tokens"] - total["tokens"]
        ratio = record.get("selected_ratio_head_1")
        own = selective_flops(shape, keys_a_query, shape.num_prediction_heads, 1.0 if ratio is None else ratio, None)
        total = {
            "tokens": record["tokens"],
            "pairs": total["pairs"]
            + num_steps * sum(record[f"selected_count_head_{head}"] for head in range(shape.num_prediction_heads)),
            "flops": total["flops"] + tokens * own,
            "flops_with_reference": total["flops_with_reference"] + tokens * (own + reference),
        }
        before = record["step"]
        logged.append(before)
        spent.append(dict(total))

    # Steps are validated that are not logged: what was spent by then lies straight between those that are.
    validations = [record for record in records if record.get("split") == "validation" and record["step"] <= before]
    curve = []
    for step in sorted({record["step"] for record in validations}):
        by_then = {budget: float(np.interp(step, logged, [each[budget] for each in spent])) for budget in total}
        bits = statistics.fmean(record["bits_per_byte"] for record in validations if record["step"] == step)
        curve.append({"step": step, **by_then, "bits_per_byte": bits})
    return curve


def _selected_by_source(steps: Sequence[Figures], num_heads: int) -> dict[str, float]:
    """The share of each source's valid pairs that heads 1… selected, over the last quarter of the logged steps."""
    late = steps[3 * len(steps) // 4 :]
    found = {}
    for source in SOURCES:
        ratios = [
            record[key]
            for record in late
            for key in (f"selected_ratio_head_{head}_source_{source}" for head in range(1, num_heads))
            if record.get(key) is not None
        ]
        if ratios:
            found[source] = statistics.fmean(ratios)
    return found


def _mean_of(records: Sequence[Figures], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.fmean(values) if values else None


def _enrichment(steps: Sequence[Figures], num_heads: int) -> list[Figures]:
    """Over the run, in at most ten stretches: each source's share of the pairs that heads 1… selected over its share of all."""
    found = []
    edges = np.linspace(0, len(steps), min(_STRETCHES, len(steps)) + 1).astype(int).tolist()
    for part in (steps[first:end] for first, end in itertools.pairwise(edges)):
        of_sources: Figures = {}
        for source in SOURCES:
            ratios = [
                record[f"selected_ratio_head_{head}_source_{source}"] / record[f"selected_ratio_head_{head}"]
                for record in part
                for head in range(1, num_heads)
                if record.get(f"selected_ratio_head_{head}_source_{source}") is not None
                and record[f"selected_ratio_head_{head}"]
            ]
            if ratios:
                of_sources[source] = statistics.fmean(ratios)
        if of_sources:
            found.append({"tokens": part[-1]["tokens"], **of_sources})
    return found


def best_rates(plan: Plan, runs: Mapping[RunName, Figures]) -> dict[str, float]:
    """Each arm's learning rate with the lowest figure in stage one."""
    return {arm: min(plan.learning_rates, key=lambda rate: runs[RunName(arm, rate, 0)]["bits_per_byte"]) for arm in plan.arms}


def runs_to_decode(plan: Plan, rates: Mapping[str, float], runs: Mapping[RunName, Figures]) -> list[RunName]:
    """The runs of several heads at their arm's best rate."""
    return [run for run in runs if run.learning_rate == rates[run.arm] and len(runs[run]["losses"]) > 1]


def collect(
    plan: Plan,
    directory: Path,
    runs: Mapping[RunName, Figures],
    speed: Mapping[str, float],
    accepted: Mapping[RunName, float],
) -> Figures:
    """All results, as results.json has them.

    speed: tokens per second by arm. accepted: tokens that a step accepts, of `runs_to_decode`.
    """
    rates = best_rates(plan, runs)
    for run, figures in runs.items():
        figures["accepted_per_step"] = accepted.get(run)
        for point in figures["curve"]:
            point["seconds"] = point["tokens"] / speed[run.arm]
    unigram = _unigram(directory)
    arms = {arm: _of_arm(plan, arm, rates[arm], runs, unigram) | {"tokens_per_second": speed[arm]} for arm in plan.arms}
    unlearned = [arm for arm in plan.main_arms if not arms[arm]["last_head_learned"]]
    kinds = labels(directory / "data" / "corpus" / "mix", KIND_FILE)
    counts = np.bincount(kinds.flatten(), minlength=len(NOISE) + 1)[: len(NOISE) + 1]
    return {
        "decides": plan.decides,
        "valid": not unlearned,
        "invalid_because": [f"{arm}: its last head learned too little beyond frequencies" for arm in unlearned],
        "metric": "head-0 bits per byte of clean held-out text, the mean over its sources; lower is better",
        "unigram": unigram,
        "tokens": {name: int(count) for name, count in zip(("clean", *NOISE), counts, strict=True)},
        "arms": arms,
        "comparisons": _comparisons(plan, rates, runs),
        "comparisons_of_accepted": _comparisons_of_accepted(plan, rates, runs),
        "plan": plan.model_dump(mode="json"),
    }


def _of_arm(plan: Plan, arm: str, rate: float, runs: Mapping[RunName, Figures], unigram: float) -> Figures:
    """One arm's runs: stage one at each rate, stage two at the best one, and the figures at equal budgets."""
    chosen = [runs[run] for run in runs if run.arm == arm and run.learning_rate == rate]
    new = [each for each in chosen if each["seed"]] or chosen
    values = [each["bits_per_byte"] for each in new]
    losses = chosen[0]["losses"]
    budgets = {budget: min(figures["curve"][-1][budget] for figures in runs.values()) for budget in _BUDGETS}
    return {
        "learning_rate": rate,
        "bits_per_byte": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "num_seeds": len(values),
        "stage_one": {f"{each:g}": runs[RunName(arm, each, 0)]["bits_per_byte"] for each in plan.learning_rates},
        "rate_at_edge": len(plan.learning_rates) > 2 and rate in (min(plan.learning_rates), max(plan.learning_rates)),
        "losses": losses,
        "last_head_learned": len(losses) == 1 or unigram - losses[-1] >= plan.least_learned,
        "at_equal": {
            budget: statistics.fmean(read_off(each["curve"], budget, at) for each in new) for budget, at in budgets.items()
        },
        "selected_by_source": chosen[0]["selected_by_source"],
        "enrichment": chosen[0]["enrichment"],
        "trunk_gradient_norms": chosen[0]["trunk_gradient_norms"],
        "accepted_per_step": _mean_of(new, "accepted_per_step"),
        "runs": chosen,
    }


def read_off(curve: Sequence[Mapping[str, float]], budget: str, at: float) -> float:
    """The figure at which a curve passes a budget, straight between its points."""
    return float(np.interp(at, [point[budget] for point in curve], [point["bits_per_byte"] for point in curve]))


def _comparisons(plan: Plan, rates: Mapping[str, float], runs: Mapping[RunName, Figures]) -> list[Figures]:
    """Every pair of main arms on stage two's seeds; the primary ones first, corrected among themselves."""
    main = plan.main_arms
    others = [(one, other) for index, one in enumerate(main) for other in main[index + 1 :]]
    others = [pair for pair in others if pair not in plan.primary and pair[::-1] not in plan.primary]
    found: list[Figures] = []
    for one, other in [*plan.primary, *others]:
        paired = _paired(plan, rates, runs, (one, other), "bits_per_byte")
        found.append({"first": one, "second": other, "primary": (one, other) in plan.primary} | paired)
    corrected = holm([each["p_t"] for each in found[: len(plan.primary)]])
    for each, p_value in zip(found, corrected, strict=False):
        each["p_holm"] = p_value
    return found


def _comparisons_of_accepted(plan: Plan, rates: Mapping[str, float], runs: Mapping[RunName, Figures]) -> list[Figures]:
    """Every pair of main arms with several heads, by what a step accepts; exploratory."""
    main = [arm for arm in plan.main_arms if len(runs[RunName(arm, rates[arm], plan.seeds[0])]["losses"]) > 1]
    return [
        {"first": one, "second": other, **_paired(plan, rates, runs, (one, other), "accepted_per_step")}
        for one, other in itertools.combinations(main, 2)
    ]


def _paired(
    plan: Plan, rates: Mapping[str, float], runs: Mapping[RunName, Figures], arms: tuple[str, str], figure: str
) -> Figures:
    values = [[runs[RunName(arm, rates[arm], seed)][figure] for seed in plan.seeds] for arm in arms]
    return paired_test(*values)._asdict()


def _unigram(directory: Path) -> float:
    """Entropy of the held-out tokens' frequencies in nats, the mean over the clean sources: what knowing only these costs."""
    entropies = []
    for name in CLEAN_SOURCES:
        tokens_ST, lengths_S = tokens_of(directory / "data" / "corpus" / "validation" / name)
        tokens = tokens_ST[np.arange(tokens_ST.shape[1]) < lengths_S[:, None]]
        shares = np.bincount(tokens) / len(tokens)
        shares = shares[shares > 0]
        entropies.append(float(-(shares * np.log(shares)).sum()))
    return statistics.fmean(entropies)
