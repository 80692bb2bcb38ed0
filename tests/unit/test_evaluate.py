"""A validation over several batches against dense losses, and one of a model that has diverged."""

import math
from typing import Any

import pytest
import torch

from pipeline.config import Settings
from pipeline.data.loading.batch import targets_and_valid
from pipeline.evaluate import evaluate
from pipeline.micro_step import Models
from pipeline.model.mtp import MTPModel
from pipeline.runtime.distributed import World
from pipeline.runtime.logbook import without_non_finite
from pipeline.schedule import objective_at
from tests.dense import HEADS, all_losses, dense_model, dense_objective, settings_for, whole_batch
from tests.rows import part_of


def validated(settings: Settings, policy: MTPModel, reference: MTPModel) -> dict[str, Any]:
    batches = [part_of(whole_batch(), slice(start, start + 2)) for start in (2, 4, 6)]
    models = Models(policy, reference, "shifted", None)
    return evaluate(models, batches, settings, objective_at(settings, 0), ("",), World(0, 1, 0, 1), torch.device("cpu"))


def test_held_out_losses_are_means_over_all_valid_pairs() -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    record = validated(settings, policy, reference)
    batch = whole_batch()
    losses = all_losses(policy, batch).detach()
    _, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)
    for head in range(HEADS):
        assert record[f"loss_head_{head}"] == pytest.approx(losses[..., head][valid[..., head]].mean().item(), rel=1e-6)
        assert record[f"valid_count_head_{head}"] == valid[..., head].sum()
    assert None not in record.values()


@pytest.mark.parametrize("normalize_by", ["valid", "selected"])
def test_the_held_out_objective_is_the_formula_with_every_batch_a_pool(normalize_by: str) -> None:
    settings = settings_for(1, 4, normalize_by=normalize_by)
    record = validated(settings, dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1))
    objective, _ = dense_objective(settings, 1)
    assert record["loss"] == pytest.approx(objective.item(), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_that_has_diverged_has_no_losses_rather_than_good_ones(value: float) -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    with torch.no_grad():
        policy.heads[2].ffn.down.weight[0, 0] = value
    record = validated(settings, policy, reference)
    assert record == without_non_finite(record), "null by itself, not because JSON cannot say it"
    assert [record[f"loss_head_{head}"] is None for head in range(HEADS)] == [False, False, True, False]
    assert record["loss"] is record["threshold_head_2"] is record["selected_loss_head_2"] is None


def test_a_reference_that_is_broken_leaves_the_policys_losses_and_no_comparison() -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    good = validated(settings, policy, reference)
    with torch.no_grad():
        reference.unembed.weight[3, 5] = math.nan
    record = validated(settings, policy, reference)
    for head in range(HEADS):
        assert record[f"loss_head_{head}"] == good[f"loss_head_{head}"]
    for key in ("loss", "excess_mean", *(f"{name}_head_{head}" for name in ("threshold", "excess_p50") for head in (1, 2, 3))):
        assert record[key] is None, key
