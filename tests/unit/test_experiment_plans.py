"""The experiment's plans, and its statistics against naive ones."""

import itertools
import json
import math
import random
import statistics

import pytest

from pipeline.config import ConfigError
from pipeline.experiment import conduct
from pipeline.experiment.plan import RunName, read_plan, settings_of, stage_one
from pipeline.experiment.results import read_off, run_figures
from pipeline.experiment.runs import CommandFailedError, StoppedOnRequestError
from pipeline.recipe import load_settings
from pipeline.report.significance import holm, paired_test, quantile_of_t, sign_test, t_probability
from tests.forked import ROOT

PLANS = ROOT / "launch" / "recipes" / "experiment"


def t_by_integration(t: float, freedom: int) -> float:
    """P(T <= t) by the trapezoidal rule over the density of Student's t."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    num = 20_000
    values = [scale * (1 + (t * step / num) ** 2 / freedom) ** (-(freedom + 1) / 2) for step in range(num + 1)]
    return 0.5 + t / num * (sum(values) - (values[0] + values[-1]) / 2)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30])
def test_students_t_is_the_integral_of_its_density(freedom: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.5, 7.0):
        assert t_probability(t, freedom) == pytest.approx(t_by_integration(t, freedom), abs=1e-7)
    assert t_probability(quantile_of_t(0.975, freedom), freedom) == pytest.approx(0.975, abs=1e-12)


def test_the_quantiles_are_those_of_the_tables() -> None:
    # Abramowitz and Stegun, table 26.10.
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {freedom: round(quantile_of_t(0.975, freedom), 3) for freedom in known} == known


def test_a_paired_test_is_one_of_the_differences() -> None:
    draw = random.Random(1)
    first, second = ([draw.gauss(0, 1) for _ in range(6)] for _ in range(2))
    differences = [one - other for one, other in zip(first, second, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(6)
    found = paired_test(first, second)
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.p_t == pytest.approx(2 * (1 - t_by_integration(abs(found.mean) / error, 5)), abs=1e-6)
    assert found.high - found.mean == pytest.approx(found.mean - found.low) == pytest.approx(2.5706 * error, rel=1e-4)


def test_the_sign_test_counts_every_pattern_of_signs() -> None:
    for differences in ([1, 2, 3, 4, 5, 6], [1, -2, 3, 4, 5, 6], [1, -1, 0, 2], [0, 0]):
        signs = [each > 0 for each in differences if each]
        uneven = abs(sum(signs) - len(signs) / 2)
        patterns = list(itertools.product([False, True], repeat=len(signs)))
        expected = sum(abs(sum(pattern) - len(signs) / 2) >= uneven for pattern in patterns) / len(patterns)
        assert sign_test(differences) == pytest.approx(expected)


def test_holms_correction_steps_down() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]


def test_a_curve_is_read_off_between_its_points() -> None:
    curve = [{"tokens": 0, "bits_per_byte": 5.0}, {"tokens": 100, "bits_per_byte": 3.0}, {"tokens": 200, "bits_per_byte": 2.0}]
    assert [read_off(curve, "tokens", at) for at in (50, 100, 150)] == [4.0, 3.0, 2.5]


@pytest.mark.parametrize("name", ["full.yaml", "quick.yaml", "smoke.yaml"])
def test_every_arm_of_a_shipped_plan_is_an_ordinary_recipe(name: str, tmp_path) -> None:
    plan = read_plan(PLANS / name)
    for run in stage_one(plan):
        k_percent = [(0, 0.5)] if plan.arms[run.arm].clean_share else None
        settings = settings_of(plan, run, tmp_path, k_percent)
        (tmp_path / "recipe.yaml").write_text(settings.to_yaml())
        assert load_settings(tmp_path / "recipe.yaml") == settings
        assert settings.training.gradient_clipping is None
        assert settings.training.final_learning_rate_fraction == 1
        assert settings.training.normalize_by == ("valid" if run.arm == "rho1_valid" else "selected")


def test_seeds_pair_the_arms_and_differ_among_runs(tmp_path) -> None:
    plan = read_plan(PLANS / "full.yaml")
    first, second = (settings_of(plan, RunName("random", 1e-3, seed), tmp_path) for seed in (1, 2))
    other = settings_of(plan, RunName("dense", 1e-3, 1), tmp_path)
    assert (first.data.seed, first.model.seed, first.training.selection_seed) == (1, 1, 1)
    assert (second.data.seed, second.model.seed, second.training.selection_seed) == (2, 2, 2)
    assert (other.data.seed, other.model.seed) == (1, 1)


def test_a_plan_with_an_arm_that_does_not_exist_is_refused(tmp_path) -> None:
    for file in PLANS.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    plan = tmp_path / "smoke.yaml"
    plan.write_text(plan.read_text().replace("random, rho1_shifted, oracle,", "random, rho2, oracle,"))
    with pytest.raises(ConfigError, match="rho2: no such arm"):
        read_plan(plan)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("noise: 0.34", "nois: 0.34", "corpus"),
        ("corpus:", "corpse:", "corpus: "),
        ("dim: 16", "dimm: 16", "model.dimm"),
        ("arms: [", "arms: 5 # [", "arms: expected a list"),
        ("model: {dim: 16, num_layers: 2}", "model: 5", "expected sections of a recipe"),
        ("", "[1, 2]", "expected keys and values; got list"),
    ],
)
def test_a_mistake_in_a_plan_is_one_message_before_the_folder_is_begun(before: str, after: str, said: str, tmp_path) -> None:
    for name in ("arms.yaml", "base.yaml"):
        (tmp_path / name).write_text((PLANS / name).read_text())
    content = (PLANS / "smoke.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(content.replace(before, after, 1) if before else after)
    with pytest.raises(ConfigError, match=said):
        read_plan(tmp_path / "mine.yaml")


def test_the_hours_of_a_start_that_was_stopped_are_counted(monkeypatch, tmp_path) -> None:
    def stopped_on_request(*_: object) -> None:
        raise StoppedOnRequestError

    monkeypatch.setattr(conduct, "_conduct", stopped_on_request)
    monkeypatch.setattr(conduct.signal, "signal", lambda *_: None)
    hours = []
    for _ in range(2):
        with pytest.raises(StoppedOnRequestError):
            conduct.conduct(read_plan(PLANS / "smoke.yaml"), tmp_path)
        hours.append(json.loads((tmp_path / "hours.json").read_text()))
    assert 0 < hours[0] < hours[1]


def test_a_run_whose_records_were_damaged_is_named_with_what_to_do(tmp_path) -> None:
    plan = read_plan(PLANS / "smoke.yaml")
    run = stage_one(plan)[0]
    (tmp_path / "runs" / str(run)).mkdir(parents=True)
    # What a validation at the end wrote, after the records before it were lost.
    last = {"split": "validation", "step": plan.steps, "bits_per_byte": 2.0}
    (tmp_path / "runs" / str(run) / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    with pytest.raises(CommandFailedError, match=rf"{run}/metrics.jsonl: expected records up to step {plan.steps}.*remove"):
        run_figures(plan, run, tmp_path)


def test_a_curve_has_every_validation_also_between_logged_steps(tmp_path) -> None:
    plan = read_plan(PLANS / "smoke.yaml")
    run = RunName("next_token", plan.learning_rates[0], 0)
    logged = [{"step": step, "tokens": 256 * step, "selected_count_head_0": 200, "grad_norm": 1.0} for step in (2, plan.steps)]
    validated = [
        {"split": "validation", "set": name, "step": step, "bits_per_byte": bits, "loss_head_0": 1.0}
        for step, of_sets in ((0, (9.0, 7.0)), (1, (6.0, 4.0)), (3, (4.0, 2.0)), (plan.steps, (3.0, 1.0)))
        for name, bits in zip(("manual", "code"), of_sets, strict=True)
    ]
    (tmp_path / "runs" / str(run)).mkdir(parents=True)
    (tmp_path / "runs" / str(run) / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*logged, *validated])) + "\n")
    curve = run_figures(plan, run, tmp_path)["curve"]
    assert [(point["step"], point["tokens"], point["pairs"], point["bits_per_byte"]) for point in curve] == [
        (0, 0, 0, 8.0),
        (1, 256, 200, 5.0),
        (3, 768, 600, 3.0),
        (4, 1024, 800, 2.0),
    ]
    assert curve[2]["flops"] == pytest.approx(0.75 * curve[3]["flops"])
