"""Thresholds to come, from those that were."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Settings
from pipeline.consumption import Consumed
from pipeline.progress import Progress
from pipeline.run import StepResult
from pipeline.runtime.metrics import SelectionSums
from pipeline.train import advance
from pipeline.weighting.objective import ObjectiveSettings, StepCounts
from pipeline.weighting.prediction import FOLLOW, Prediction
from pipeline.weighting.score import Comparison
from pipeline.weighting.selectors import TopOfPool

CPU = torch.device("cpu")


def followed(*thresholds: list[float]) -> Prediction:
    """From nothing, one threshold after the other."""
    return Prediction().after([torch.tensor(threshold_K) for threshold_K in thresholds])


def test_before_the_first_step_nothing_is_predicted() -> None:
    assert Prediction().thresholds(CPU) is None
    assert Prediction().numbers() == []


def test_a_head_without_a_threshold_yet_is_predicted_to_select_nothing() -> None:
    scores = followed([math.nan, 0.5]).thresholds(CPU)
    assert scores is not None
    assert (scores.dtype, scores.tolist()) == (torch.float32, [math.inf, 0.5])


def test_the_average_goes_halfway() -> None:
    assert followed([1.0], [2.0]).numbers() == [1.5]
    assert followed([1.0]).after([torch.tensor([2.0])]).after([torch.tensor([0.5])]).numbers() == [1.0]
    assert followed([math.nan], [2.0], [1.0]).numbers() == [1.5]


@given(st.lists(st.floats(width=32), max_size=8))
def test_averages_are_those_of_float64_arithmetic_on_the_host(thresholds: list[float]) -> None:
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


def test_pairs_are_predicted_by_the_score_that_they_compete_with() -> None:
    reference = torch.arange(12.0).view(2, 3, 2)
    valid, random = torch.ones(2, 3, 2, dtype=torch.bool), reference / 12
    # Into [B, T, H]: heads 1 and 2 of the first position, of the third and fourth, and of the last.
    indices, loss = torch.tensor([1, 8, 10, 17]), torch.tensor([4.0, 7.0, math.nan, 11.5])

    def margins(score: str, reference: torch.Tensor | None, thresholds: list[float]) -> list[float]:
        compared = Comparison(score, valid, reference, random)
        selector = TopOfPool(compared, "global", 0.6, [6, 6], [4, 4], "radix", None, torch.tensor(thresholds))
        return selector.predicted_margin(loss, indices).tolist()

    thresholds = [4.0, 1.0]
    assert margins("excess", reference, thresholds) == pytest.approx([0.0, 1.0, math.nan, -0.5], nan_ok=True)
    assert margins("policy_loss", reference, thresholds) == pytest.approx([0.0, 6.0, math.nan, 10.5], nan_ok=True)
    by_chance = margins("random", None, [0.5, 0.75])
    assert by_chance == pytest.approx([-0.5, 5 / 12 - 0.75, math.nan, 11 / 12 - 0.75], nan_ok=True)


def test_json_keeps_every_bit() -> None:
    progress = Progress(step=3, prediction=Prediction.of([1 / 3, None, math.pi / 7]), tokens_by_source=[5])
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))).to_json() == progress.to_json()


@pytest.mark.parametrize(("applied", "pool", "level"), [(True, "global", 2.0), (False, "global", 1.0), (True, "rank", 1.0)])
def test_it_learns_from_applied_steps_of_pools_that_ranks_share_alone(applied: bool, pool: str, level: float) -> None:
    sums = SelectionSums(2, 1, torch.device("cpu"))
    sums.thresholds.append(torch.tensor([3.0]))
    objective = ObjectiveSettings(0.6, [1.0, 1.0], pool, "valid")
    counts = StepCounts([[1, 1]], [1, 1], [[1]], [1.0, 1.0], [], objective)
    result = StepResult(counts, Consumed(9, 9, 0, 0, 0, [9], [1]), [], sums, torch.tensor(2.0), 1.0, 0.1, applied, None)
    progress = Progress(prediction=Prediction.of([1.0]))
    advance(progress, result, Settings.model_validate({"training": {"selection_pool": pool}}))
    assert progress.prediction.numbers() == [level]
    assert (progress.losses.numbers(), progress.gradient_norms.numbers()) == (([2.0], [1.0]) if applied else ([], []))
