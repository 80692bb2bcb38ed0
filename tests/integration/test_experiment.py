"""The experiment's machinery, whole, on models that learn nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.experiment.corpus import CLEAN_SOURCES, KIND_FILE, NO_TOKEN, NOISE, labels
from pipeline.experiment.page import page
from pipeline.experiment.plan import read_plan, stage_one, stage_two
from pipeline.experiment.preparing import tokens_of
from pipeline.experiment.results import best_rates, collect, run_figures
from tests.forked import ROOT, run_script

PLAN = ROOT / "launch" / "recipes" / "experiment" / "smoke.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiment") / "out"
    finished = conduct(directory)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return directory


def conduct(directory: Path) -> Any:
    return run_script("experiment.py", "--plan", PLAN, "--output", directory, with_its_processes=True, timeout=1500)


def results_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return found


def test_every_arm_has_its_figures_and_the_main_ones_their_seeds(done) -> None:
    results, plan = results_of(done), read_plan(PLAN)
    assert list(results["arms"]) == list(plan.arms)
    assert all(any(word in name for name in results["arms"]) for word in ("next_token", "random", "rho1", "oracle"))
    assert (results["decides"], results["valid"]) == (False, True)
    for name, arm in results["arms"].items():
        assert arm["num_seeds"] == (len(plan.seeds) if name in plan.main_arms else 1)
        assert 0 < arm["bits_per_byte"] < 20
        assert arm["at_equal"]["tokens"] == pytest.approx(arm["bits_per_byte"], rel=0.2)
        assert len(arm["losses"]) == (1 if name == "next_token" else 4)
        assert arm["tokens_per_second"] > 0
        assert len(arm["trunk_gradient_norms"]) == len(arm["losses"])
        for run in arm["runs"]:
            assert all(point["seconds"] == point["tokens"] / arm["tokens_per_second"] for point in run["curve"])
            if arm["learning_rate"] == run["learning_rate"] and name != "next_token":
                assert 1 <= run["accepted_per_step"] <= 4
    assert [(each["first"], each["second"]) for each in results["comparisons_of_accepted"]] == [("random", "rho1_shifted")]
    first, second, *others = results["comparisons"]
    assert [(each["first"], each["second"]) for each in (first, second)] == plan.primary
    assert not any(each["primary"] for each in others)
    differences = [
        one["bits_per_byte"] - other["bits_per_byte"]
        for one, other in zip(*(results["arms"][name]["runs"][1:] for name in plan.primary[0]), strict=True)
    ]
    assert first["differences"] == pytest.approx(differences)


def test_an_oracle_takes_clean_tokens_alone(done) -> None:
    selected = results_of(done)["arms"]["oracle"]["selected_by_source"]
    assert all(selected.get(name, 0) == 0 for name in ("shuffled", "random", "boilerplate"))
    assert all(selected[name] > 0.9 for name in CLEAN_SOURCES if name in selected)


def test_selections_of_two_references_and_of_two_seeds_are_compared(done) -> None:
    selections = results_of(done)["selections"]
    assert selections["chance"] == pytest.approx(0.6 / 1.4)
    for name in ("shifted_and_matched", "two_seeds"):
        assert len(selections[name]) == 3
        assert all(0 <= share <= 1 for share in selections[name])
    # Models that learned nothing, with seeds that share nothing but the references.
    assert list(selections["selected_by_truth"]) == ["rho1_shifted"]
    assert list(selections["selected_by_truth"]["rho1_shifted"]) == ["clean", *NOISE]
    differ = selections["differ_on"]
    for names in (
        ("begins a word", "within a word", "no word"),
        ("frequent", "of middle frequency", "rare"),
        ("distance 2", "distance 3", "distance 4"),
    ):
        for of in ("of all", "shifted alone", "matched alone"):
            assert sum(differ[name][of] for name in names) == pytest.approx(1.0), (names, of)


def test_the_truth_of_each_token_is_known(done) -> None:
    data = done / "data" / "corpus" / "mix"
    kinds, (tokens, lengths) = labels(data, KIND_FILE), tokens_of(data)
    assert kinds.shape == tokens.shape
    assert ((kinds != NO_TOKEN).sum(1) == lengths).all()
    shares = np.bincount(kinds[kinds != NO_TOKEN], minlength=len(NOISE) + 1) / lengths.sum()
    assert 0.2 < shares[1:].sum() < 0.4
    assert (shares > 0.02).all()
    # What is drawn evenly is drawn from the whole vocabulary; what is clean follows its frequencies.
    counts = [np.bincount(tokens[kinds == kind], minlength=300) for kind in (NOISE.index("random") + 1, 0)]
    assert counts[0].max() < 0.05 * counts[0].sum()


def test_the_same_command_makes_no_run_twice_and_another_plan_is_refused(done, tmp_path) -> None:
    before = results_of(done)
    began = {path: path.stat().st_mtime_ns for path in done.glob("runs/*/metrics.jsonl")}
    assert conduct(done).returncode == 0
    assert began == {path: path.stat().st_mtime_ns for path in done.glob("runs/*/metrics.jsonl")}
    assert results_of(done) | {"hours": 0} == before | {"hours": 0}
    refused = run_script("experiment.py", "--quick", "--output", done)
    assert refused.returncode == 2
    assert "was begun with another plan" in refused.stderr


def test_the_page_needs_nothing_else(done) -> None:
    page = (done / "index.html").read_text()
    assert "too small to decide anything" in page
    assert "oracle" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_main_arms_have_to_have_learned_and_others_are_marked(done) -> None:
    plan = read_plan(PLAN).model_copy(update={"least_learned": 100.0})
    first = {run: run_figures(plan, run, done) for run in stage_one(plan)}
    rates = best_rates(plan, first)
    runs = first | {run: run_figures(plan, run, done) for run in stage_two(plan, rates)}
    found = collect(plan, done, runs, dict.fromkeys(plan.arms, 1.0), dict.fromkeys(runs, 1.0))
    assert found["valid"] is False
    assert [reason.partition(":")[0] for reason in found["invalid_because"]] == ["random", "rho1_shifted"]
    shown = page(results_of(done) | found)
    assert (shown.count("Invalid"), shown.count("†</td>")) == (1, len(plan.arms) - 1)
