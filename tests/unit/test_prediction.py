"""Thresholds to come, from those that were."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Settings
from pipeline.consumption import Consumed
from pipeline.micro_step import Comparison
from pipeline.progress import Progress
from pipeline.run import StepResult
from pipeline.runtime.metrics import SelectionSums
from pipeline.train import advance
from pipeline.weighting.objective import StepPlan
from pipeline.weighting.prediction import FOLLOW, Prediction

CPU = torch.device("cpu")


def followed(*thresholds: list[float]) -> Prediction:
    """From nothing, one threshold after the other."""
    return Prediction().after([torch.tensor(threshold_K) for threshold_K in thresholds])


def test_before_the_first_step_nothing_is_foreseen() -> None:
    assert Prediction().scores(CPU) is None
    assert Prediction().numbers() == []


def test_a_head_without_a_threshold_yet_is_foreseen_to_select_nothing() -> None:
    scores = followed([math.nan, 0.5]).scores(CPU)
    assert scores is not None
    assert (scores.dtype, scores.tolist()) == (torch.float32, [math.inf, 0.5])


def test_the_level_goes_halfway() -> None:
    assert followed([1.0], [2.0]).numbers() == [1.5]
    assert followed([1.0]).after([torch.tensor([2.0])]).after([torch.tensor([0.5])]).numbers() == [1.0]
    assert followed([math.nan], [2.0], [1.0]).numbers() == [1.5]


@given(st.lists(st.floats(width=32), max_size=8))
def test_levels_are_those_of_float64_arithmetic_on_the_host(thresholds: list[float]) -> None:
    level = None
    for threshold in filter(math.isfinite, thresholds):
        level = threshold if level is None else level + FOLLOW * (threshold - level)
    assert followed(*([threshold] for threshold in thresholds)).numbers() == ([level] if thresholds else [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pool_without_pairs_changes_nothing(bad: float) -> None:
    assert Prediction.of([1.5, 0.25]).after([torch.tensor([bad, 0.75])]).numbers() == [1.5, 0.5]
    assert Prediction.of([None, 0.25]).after([torch.tensor([bad, 0.75])]).numbers() == [None, 0.5]


def test_it_follows_a_threshold_that_drifts_and_lies_in_the_middle_of_its_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    thresholds = 2.0 - 0.001 * torch.arange(400) + 0.05 * torch.randn(400, generator=generator)
    prediction, above = Prediction(), 0
    for step, threshold in enumerate(thresholds):
        if step >= 20:
            (level,) = prediction.numbers()
            assert level is not None
            assert abs(level - threshold) < 0.25
            above += level >= threshold
        prediction = prediction.after([threshold[None]])
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
    progress = Progress(step=3, prediction=Prediction.of([1 / 3, None, math.pi / 7]), tokens_by_source=[5])
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))).to_json() == progress.to_json()


@pytest.mark.parametrize(("applied", "pool", "level"), [(True, "global", 2.0), (False, "global", 1.0), (True, "rank", 1.0)])
def test_it_learns_from_applied_steps_of_pools_that_ranks_share_alone(applied: bool, pool: str, level: float) -> None:
    sums = SelectionSums(2, 1, torch.device("cpu"))
    sums.thresholds.append(torch.tensor([3.0]))
    plan = StepPlan([[1, 1]], [1, 1], [[1]], [1.0, 1.0], [])
    result = StepResult(plan, Consumed(9, 9, 0, 0, [9], [1]), [], sums, 0.1, applied, None)
    progress = Progress(prediction=Prediction.of([1.0]))
    advance(progress, result, Settings.model_validate({"training": {"selection_pool": pool}}))
    assert progress.prediction.numbers() == [level]
