"""Pools, exchanges, scores and horizons in the real pipeline on two ranks: what is logged is what was chosen."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.config import ModelSettings, Settings
from pipeline.data.shards.manifest import read_manifest
from pipeline.model.export import save_model
from pipeline.model.mtp import MTPModel, initialize_weights
from tests.integration.test_pipeline_rho1 import job_on_this_rank, resume, settings_for
from tests.ranks import run_ranks

SHORT = ("training.steps=4", "data.num_workers=0", "training.check_ranks_every=1", "logging.validation_samples=16")


def steps_and_validation(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "split" not in line], [line for line in lines if "split" in line]


@pytest.fixture(scope="module")
def four_headed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference with as many heads as the policy."""
    directory = tmp_path_factory.mktemp("four_headed")
    vocab_size = read_manifest(tiny_data / "train").vocab_size
    model = MTPModel(ModelSettings(dim=16, num_layers=2, num_attention_heads=2, vocab_size=vocab_size, seed=3))
    initialize_weights(model)
    save_model(model, directory)
    shutil.copyfile(tiny_data / "tokenizer.json", directory / "tokenizer.json")
    return directory


def test_a_pool_of_the_whole_step_is_rounded_once(tiny_data, tiny_reference, tmp_path) -> None:
    changed = ("training.selection_pool=step", "training.selection_exchange=radix", "training.k_percent=0.37")
    assert run_ranks(resume, 2, settings_for(tiny_data, tiny_reference, *SHORT, *changed), tmp_path) == [0, 0]
    steps, validation = steps_and_validation(tmp_path)
    assert len(steps) == 4
    for line in steps:
        for head in (1, 2, 3):
            assert line[f"selected_count_head_{head}"] == math.floor(0.37 * line[f"valid_count_head_{head}"] + 0.5)
            assert isinstance(line[f"threshold_head_{head}"], float)
    assert all(abs(line["selected_ratio_head_1"] - 0.37) < 0.05 for line in validation)


def test_rows_compete_by_the_policys_loss_without_a_reference(tiny_data, tiny_reference, tmp_path) -> None:
    changed = ("training.selection_pool=row", "training.selection_score=policy_loss", "reference.path=null")
    assert run_ranks(resume, 2, settings_for(tiny_data, tiny_reference, *SHORT, *changed), tmp_path) == [0, 0]
    steps, _ = steps_and_validation(tmp_path)
    for line in steps:
        for head in (1, 2, 3):
            assert 0.5 < line[f"selected_ratio_head_{head}"] < 0.75
            assert line[f"excess_mean_head_{head}"] is None
            # The hardest pairs.
            assert line[f"threshold_head_{head}"] > 0
            assert line[f"selected_loss_head_{head}"] > line[f"loss_head_{head}"] > line[f"rejected_loss_head_{head}"]


def test_heads_can_be_compared_with_the_references_own_heads(tiny_data, four_headed, tmp_path) -> None:
    changed = ("training.selection_pool=rank", "reference.horizon=matched")
    assert run_ranks(resume, 2, settings_for(tiny_data, four_headed, *SHORT, *changed), tmp_path) == [0, 0]
    steps, _ = steps_and_validation(tmp_path)
    for line in steps:
        for head in (1, 2, 3):
            # Four pools of a step, each rounded by itself.
            assert abs(line[f"selected_count_head_{head}"] - 0.6 * line[f"valid_count_head_{head}"]) <= 2.0
            assert line[f"excess_mean_head_{head}"] == pytest.approx(0, abs=1.0)


def test_one_head_selects_everything_whatever_the_score(tiny_data, tiny_reference, tmp_path) -> None:
    changed = ("training.selection_pool=step", "training.selection_score=random", "reference.path=null")
    settings = settings_for(tiny_data, tiny_reference, *SHORT, *changed, "model.num_prediction_heads=1")
    assert run_ranks(resume, 1, settings, tmp_path) == [0]
    steps, _ = steps_and_validation(tmp_path)
    assert [(line["selected_ratio_head_0"], line["heads_per_position"]) for line in steps] == [(1.0, 1.0)] * 4
    assert not any(key.startswith("threshold") for key in steps[0])


def train_at_rates_of_their_own(settings: Settings, run_dir: Path) -> str:
    from pipeline.assembly import build_run
    from pipeline.runtime.agreement import RanksDisagreeError
    from pipeline.runtime.preemption import StopRequest
    from pipeline.train import train

    rate = settings.training.learning_rate * (1 + dist.get_rank())
    job = job_on_this_rank(settings.with_values(training={"learning_rate": rate}), run_dir)
    try:
        train(build_run(job, job.settings, run_dir), StopRequest())
    except RanksDisagreeError as error:
        return str(error)
    return "agreed"


def test_ranks_that_drift_apart_are_stopped_at_the_next_comparison(tiny_data, tiny_reference, tmp_path) -> None:
    settings = settings_for(tiny_data, tiny_reference, *SHORT, "training.check_ranks_every=2", "data.num_workers=0")
    said = run_ranks(train_at_rates_of_their_own, 2, settings, tmp_path)
    expected = (
        "ranks that must hold the same values do not: learning rate: rank(s) 1 differ from rank(s) 0. Continue from the last"
    )
    assert [text.partition(" checkpoint")[0] for text in said] == [expected] * 2
    steps, _ = steps_and_validation(tmp_path)
    assert [line["step"] for line in steps] == [1, 2]
