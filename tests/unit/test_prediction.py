"""Thresholds to come, from those that were."""

import json
import math

import pytest
import torch

from pipeline.config import Settings
from pipeline.data.consumption import Consumed
from pipeline.micro_step import Comparison
from pipeline.runtime.checkpoint import Progress
from pipeline.runtime.metrics import SelectionSums
from pipeline.train import StepResult, advance
from pipeline.weighting.objective import StepPlan
from pipeline.weighting.prediction import Prediction


def test_before_the_first_step_nothing_is_foreseen() -> None:
    assert Prediction().levels == []


def test_a_head_without_a_threshold_yet_is_foreseen_to_select_nothing() -> None:
    assert Prediction().after([[math.nan, 0.5]]).levels == [math.inf, 0.5]


def test_the_level_goes_halfway() -> None:
    prediction = Prediction().after([[1.0]]).after([[2.0]])
    assert prediction == Prediction((1.5,))
    assert prediction.after([[0.5]]) == Prediction((1.0,)) == Prediction().after([[1.0], [2.0], [0.5]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pool_without_pairs_changes_nothing(bad: float) -> None:
    assert Prediction((1.5, 0.25)).after([[bad, 0.75]]) == Prediction((1.5, 0.5))


def test_it_follows_a_threshold_that_drifts_and_lies_in_the_middle_of_its_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(400, generator=generator)).tolist()
    thresholds = [2.0 - 0.001 * step + noise[step] for step in range(400)]
    prediction, above = Prediction(), 0
    for step, threshold in enumerate(thresholds):
        if step >= 20:
            (level,) = prediction.levels
            assert abs(level - threshold) < 0.25
            above += level >= threshold
        prediction = prediction.after([[threshold]])
    assert 0.4 < above / 380 < 0.6


def test_pairs_are_foreseen_by_the_score_that_they_compete_with() -> None:
    reference = torch.arange(12.0).view(2, 3, 2)
    valid, random = torch.ones(2, 3, 2, dtype=torch.bool), reference / 12
    places, loss = torch.tensor([0, 5, 6, 11]), torch.tensor([4.0, 7.0, math.nan, 11.5])
    levels = torch.tensor([4.0, 1.0])  # of head 1 (even places) and head 2 (odd places)
    found = {
        name: Comparison(name, valid, reference, random).surplus(levels, loss, places).tolist()
        for name in ("excess", "policy_loss")
    }
    assert found["excess"] == pytest.approx([0.0, 1.0, math.nan, -0.5], nan_ok=True)
    assert found["policy_loss"] == pytest.approx([0.0, 6.0, math.nan, 10.5], nan_ok=True)
    by_chance = Comparison("random", valid, None, random).surplus(torch.tensor([0.5, 0.75]), loss, places)
    assert by_chance.tolist() == pytest.approx([-0.5, 5 / 12 - 0.75, math.nan, 11 / 12 - 0.75], nan_ok=True)


def test_json_keeps_every_bit() -> None:
    prediction = Prediction((1 / 3, None, math.pi / 7))
    again = json.loads(json.dumps({"level_K": prediction.level_K}))
    assert Prediction(tuple(again["level_K"])) == prediction


@pytest.mark.parametrize(("applied", "pool", "level"), [(True, "global", 2.0), (False, "global", 1.0), (True, "rank", 1.0)])
def test_it_learns_from_applied_steps_of_pools_that_ranks_share_alone(applied: bool, pool: str, level: float) -> None:
    sums = SelectionSums(2, 1, torch.device("cpu"))
    sums.thresholds.append(torch.tensor([3.0]))
    plan = StepPlan([[1, 1]], [1, 1], [[1]], [1.0, 1.0], [])
    result = StepResult(plan, Consumed(9, 9, 0, 0, [9], [1]), [], sums, 0.1, 1.0, applied, None, 1.0, 0.0)
    progress = Progress(prediction=Prediction((1.0,)))
    advance(progress, result, Settings.model_validate({"training": {"selection_pool": pool}}))
    assert progress.prediction.level_K == (level,)
