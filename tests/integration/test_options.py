"""Options of the objective in the real pipeline on two ranks: resumed bit for bit, and part of the run's identity."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, Settings
from pipeline.data.shards.external_scores import import_scores
from pipeline.data.shards.manifest import read_manifest
from tests.integration.test_pipeline_rho1 import job_on_this_rank, resume, settings_for
from tests.integration.test_selection_settings import SHORT, steps_and_validation
from tests.lives import without_clocks
from tests.ranks import run_ranks

SIX = (*SHORT, "training.steps=6", "checkpoint.every=3")
CHANGING = (
    "reference.path=null",
    "reference.horizon=own",
    "training.selection_warmup_steps=1",
    "training.detach_heads=true",
    "training.head_weights=[[0, [1, 0, 0, 0]], [2, [1, 0.5, 0.2, 0.1]], [6, [1, 1, 1, 1]]]",
    "training.head_weights_change=linear",
    "training.k_percent=[[0, 0.9], [4, 0.5]]",
)


def assert_resumed_to_the_bit(settings: Settings, run_dir: Path) -> list[dict[str, Any]]:
    """Train for six steps, then again from the third one on; returns the records of the steps."""
    assert run_ranks(resume, 2, settings, run_dir) == [0, 0]
    first = steps_and_validation(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    assert run_ranks(resume, 2, settings, run_dir) == [0, 0]
    for before, after in zip(first, steps_and_validation(run_dir), strict=True):
        assert without_clocks(before) == without_clocks(after)
    return first[0]


def test_a_run_whose_settings_change_over_time_is_resumed_to_the_bit(tiny_data, tiny_reference, tmp_path) -> None:
    settings = settings_for(tiny_data, tiny_reference, *SIX, *CHANGING)
    steps = assert_resumed_to_the_bit(settings, tmp_path / "run")
    ratios = [round(line["selected_ratio_head_2"], 1) for line in steps]
    assert ratios == [1.0, 0.9, 0.9, 0.9, 0.5, 0.5]
    assert all(line["selected_ratio_head_0"] == 1 for line in steps)
    # What is compared with itself as it was a moment ago differs by little, and of the same target.
    assert all(abs(line["excess_mean_head_1"]) < 1 for line in steps)


def scored_data(tiny_data: Path, directory: Path) -> Path:
    """External scores of both folders: each token's place in the row, and a little of the row's number."""
    for name in ("train", "validation"):
        number = np.arange(read_manifest(tiny_data / name).num_samples, dtype=np.float32)
        np.save(directory / f"{name}.npy", np.arange(16, dtype=np.float32) + number[:, None] / 1024)
        import_scores(directory / f"{name}.npy", tiny_data / name, directory / "scores")
    return directory / "scores"


def refusal(settings: Settings, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        resume(settings, run_dir)
    return str(caught.value)


def test_external_scores_select_and_are_part_of_the_runs_identity(tiny_data, tiny_reference, tmp_path) -> None:
    scores = scored_data(tiny_data, tmp_path)
    external = ("reference.path=null", "training.selection_score=external", "training.selection_pool=row")
    settings = settings_for(tiny_data, tiny_reference, *SIX, *external, f"training.external_scores={scores}")
    steps = assert_resumed_to_the_bit(settings, tmp_path / "run")
    for line in steps:
        for head in (1, 2, 3):
            # The last targets of each row.
            assert 5 < line[f"threshold_head_{head}"] < 11

    # The folder may move; other scores may not take its place.
    moved = settings.with_values(training={"external_scores": shutil.copytree(scores, tmp_path / "moved")})
    assert run_ranks(resume, 1, moved.with_values(data={"micro_batch": 8}), tmp_path / "run") == [0]
    np.save(tmp_path / "train.npy", np.load(tmp_path / "train.npy") + 1)
    (folder,) = (
        path.parent
        for path in scores.glob("*/manifest.json")
        if json.loads(path.read_text())["reference"].endswith("train.npy")
    )
    shutil.rmtree(folder)
    import_scores(tmp_path / "train.npy", tiny_data / "train", scores)
    (said,) = run_ranks(refusal, 1, settings.with_values(data={"micro_batch": 8}), tmp_path / "run")
    assert "external scores: was [" in said


def missing_scores(settings: Settings, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        job_on_this_rank(settings, run_dir)
    return str(caught.value)


def test_scores_of_other_data_or_losses_in_their_place_are_refused(tiny_data, tiny_reference, tmp_path) -> None:
    scores = scored_data(tiny_data, tmp_path)
    external = ("reference.path=null", "training.selection_score=external", f"training.external_scores={scores}")
    settings = settings_for(tiny_data, tiny_reference, *SIX, *external)
    other = shutil.copytree(tiny_data / "train", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest))
    (said,) = run_ranks(missing_scores, 1, settings.with_values(data={"path": other}), tmp_path / "run")
    assert f"training.external_scores: {scores}: no external scores of {other} as it is now" in said
    assert f"import them with launch/score.py --import FILE --data {other} --output {scores}" in said
    swapped = settings.with_values(
        training={"selection_score": "excess", "external_scores": None}, reference={"cached": scores}
    )
    (said,) = run_ranks(missing_scores, 1, swapped, tmp_path / "run")
    assert "were made with horizon external" in said
