"""Comparisons of runs: arms, pairs by seed, intervals, and what is refused."""

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from launch.compare import main
from pipeline.report.comparison import compare, text
from pipeline.report.errors import ReportError
from pipeline.runtime.checkpoint.folders import step_name
from pipeline.runtime.checkpoint.state import State, encode


def made_run(
    path: Path,
    score: str,
    seed: int,
    loss: float,
    data: str = "d",
    steps: tuple[int, ...] = (0, 50, 100),
    rows: int = 8,
    also: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """A run with a checkpoint; its held-out loss falls to `loss` in the last step. also: further parts of its identity."""
    path.mkdir(parents=True)
    settings = {"training.selection_score": score, "model.seed": seed, "data.path": str(path / "data"), "run.name": path.name}
    records = [
        {"step": step, "split": "validation", "rows": rows, "loss_head_0": loss + steps[-1] - step, "loss_head_1": 2 * loss}
        for step in steps
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        sections.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = value
    (path / "config.yaml").write_text(json.dumps(sections))
    state = State(
        format=1,
        world_size=1,
        progress={"step": steps[-1]},
        identity=settings | {"data": data} | dict(also),
        optimizer_step=steps[-1],
        held_out={"batch": "b", "losses": [loss]},  # type: ignore[arg-type]
        files=[],
        parameters={},
    )
    folder = path / "checkpoints" / step_name(steps[-1])
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(encode(state))
    return path


FIRST, OTHER = {0: 3.0, 1: 3.5, 2: 3.2}, {0: 2.9, 1: 3.35, 2: 3.15, 3: 9.0}


def experiment(folder: Path) -> list[Path]:
    first = [made_run(folder / f"random-{seed}", "random", seed, loss) for seed, loss in FIRST.items()]
    return [*first, *(made_run(folder / f"rho1-{seed}", "excess", seed, loss) for seed, loss in OTHER.items())]


def test_arms_are_paired_by_seed_and_differences_have_students_interval(tmp_path: Path) -> None:
    figures = compare(experiment(tmp_path))
    assert [arm["name"] for arm in figures["arms"]] == ["random-0", "rho1-0"]
    assert [len(arm["runs"]) for arm in figures["arms"]] == [3, 4]
    assert figures["arms"][1]["differs_in"] == ["training.selection_score 'random' → 'excess'"]
    first = next(each for each in figures["differences"] if each["metric"] == "loss_head_0")
    # Seed 3 has no partner. By hand: t(0.975, 2) = 4.302653.
    differences = [OTHER[seed] - FIRST[seed] for seed in (0, 1, 2)]
    mean, half = statistics.fmean(differences), 4.302653 * statistics.stdev(differences) / math.sqrt(3)
    assert first["pairs"] == 3
    assert [first[key] for key in ("mean", "low", "high")] == pytest.approx([mean, mean - half, mean + half], rel=1e-6)
    assert "-0.1000" in text(figures)


def test_runs_that_differ_in_the_seed_of_the_selection_alone_are_paired_by_it(tmp_path: Path) -> None:
    losses = {"random": (3.0, 3.5, 3.2), "excess": (2.9, 3.35, 3.15)}
    runs = [
        made_run(tmp_path / f"{score}-{seed}", score, 0, loss, also={"training.selection_seed": seed})
        for score, of_arm in losses.items()
        for seed, loss in enumerate(of_arm)
    ]
    # In whatever order they are named.
    figures = compare([*runs[:3], *reversed(runs[3:])])
    assert [len(arm["runs"]) for arm in figures["arms"]] == [3, 3]
    expected = [b - a for a, b in zip(*losses.values(), strict=True)]
    mean, half = statistics.fmean(expected), 4.302653 * statistics.stdev(expected) / math.sqrt(3)
    first = figures["differences"][0]
    assert [first[key] for key in ("pairs", "mean", "low", "high")] == pytest.approx([3, mean, mean - half, mean + half])
    assert "3 runs, paired by model.seed, data.seed and training.selection_seed" in text(figures)


def test_another_seed_of_the_selection_parts_no_runs_that_the_models_seeds_tell_apart(tmp_path: Path) -> None:
    redrawn = [
        made_run(tmp_path / f"a-{seed}", "random", seed, 3.0, also={"training.selection_seed": 7 + seed}) for seed in (0, 1)
    ]
    figures = compare([*redrawn, *(made_run(tmp_path / f"b-{seed}", "excess", seed, 2.0) for seed in (0, 1))])
    assert figures["differences"][0]["pairs"] == 2
    assert "2 runs, paired by model.seed and data.seed" in text(figures)


def test_a_folder_of_runs_stands_for_the_runs_in_it(tmp_path: Path) -> None:
    made_run(tmp_path / "a" / "0", "random", 0, 3.0)
    made_run(tmp_path / "b" / "0", "excess", 0, 2.0)
    (only, _) = compare([tmp_path / "a", tmp_path / "b"])["differences"]
    assert (only["pairs"], only["mean"], only["low"]) == (1, -1.0, None)


def test_runs_are_compared_after_the_last_step_that_all_share(tmp_path: Path) -> None:
    made_run(tmp_path / "a", "random", 0, 3.0)
    made_run(tmp_path / "b", "excess", 0, 2.0, steps=(0, 50))
    figures = compare([tmp_path / "a", tmp_path / "b"])
    assert figures["step"] == 50
    assert figures["differences"][0]["first"] == 53.0


@pytest.mark.parametrize(("unlike", "said"), [({"data": "e"}, "other training data"), ({"rows": 9}, "other held-out sets")])
def test_unlike_data_is_refused_without_being_told(tmp_path: Path, unlike: dict[str, Any], said: str) -> None:
    made_run(tmp_path / "a", "random", 0, 3.0)
    made_run(tmp_path / "b", "excess", 0, 2.0, **unlike)
    with pytest.raises(ReportError, match=said):
        compare([tmp_path / "a", tmp_path / "b"])
    figures = compare([tmp_path / "a", tmp_path / "b"], allow_unlike=True)
    assert said in text(figures)


def test_data_of_a_run_without_a_checkpoint_is_said_to_be_unknown(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / "a", "random", 0, 3.0), made_run(tmp_path / "b", "excess", 0, 2.0)]
    shutil.rmtree(runs[1] / "checkpoints")
    with pytest.raises(ReportError, match="no readable checkpoint of b, so whether the training data is the same is unknown"):
        compare(runs)


def test_what_cannot_be_paired_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made_run(tmp_path / "a", "random", 0, 3.0), made_run(tmp_path / "b", "random", 1, 2.0)
    other = made_run(tmp_path / "c", "excess", 7, 2.0)
    again = made_run(tmp_path / "d", "random", 0, 3.0)
    late = made_run(tmp_path / "e", "excess", 0, 2.0, steps=(0, 7))
    redrawn = made_run(tmp_path / "f", "random", 0, 3.0, also={"training.selection_seed": 1})
    for runs, said in (
        ([a, b], "the same settings but for their seeds"),
        ([a, other], "no two runs have the same model.seed and data.seed"),
        (
            [a, again, other],
            "a, d: runs with the same settings and the same model.seed, data.seed and training.selection_seed; name one",
        ),
        ([redrawn, a, other], "no two runs have the same model.seed, data.seed and training.selection_seed"),
        (
            [a, late],
            "all of the runs were validated (logging.validation_every): a at 0, 50, 100; e at 0, 7",
        ),
    ):
        assert main([*map(str, runs)]) == 2
        assert said in capsys.readouterr().err


def test_a_comparison_that_falls_short_of_the_runs_ends_says_so(tmp_path: Path) -> None:
    made_run(tmp_path / "a", "random", 0, 3.0)
    cut = made_run(tmp_path / "b", "excess", 0, 2.0, steps=(0, 50))
    (cut / "config.yaml").write_text("training: {steps: 100}")
    said = text(compare([tmp_path / "a", cut]))
    assert "not compared at their end, which the others have not reached or not validated: a" in said
    assert "b is not at its end: validated up to step 50 of 100" in said


def test_a_loss_that_is_not_finite_is_said_and_not_left_out(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / "a", "random", 0, 3.0), made_run(tmp_path / "b", "excess", 0, 2.0)]
    last = {"step": 100, "split": "validation", "rows": 8, "loss_head_0": None, "loss_head_1": 4.0}
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    figures = compare(runs)
    assert [(each["metric"], each["mean"]) for each in figures["differences"]] == [("loss_head_0", None), ("loss_head_1", -2.0)]
    assert "not finite in one of the runs" in text(figures)


def test_runs_without_a_figure_in_common_are_refused(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / "a", "random", 0, 3.0), made_run(tmp_path / "b", "excess", 0, 2.0)]
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"rows"', '"set": "web", "rows"'))
    with pytest.raises(ReportError, match="no held-out figure is known of both arms"):
        compare(runs, allow_unlike=True)


def test_runs_that_trained_their_own_references_are_one_arm_wherever_they_were_moved(tmp_path: Path) -> None:
    runs = []
    for score, seed in itertools.product(("random", "excess"), (0, 1)):
        name = f"{score}-{seed}"
        of_reference = {"reference.path": f"/where/they/were/{name}/reference", "reference model": name}
        runs.append(made_run(tmp_path / name, score, seed, 3.0, also=of_reference))
        (runs[-1] / "reference" / "training").mkdir(parents=True)
    assert [len(arm["runs"]) for arm in compare(runs)["arms"]] == [2, 2]


def test_figures_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = experiment(tmp_path / "runs")
    assert main([*map(str, runs), "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == compare(runs)
    assert "95 % interval" in capsys.readouterr().out
