"""The learning rate as a function of applied steps, and the objective's settings as one of the step."""

import math

import pytest

from pipeline.config import Settings, TrainingSettings
from pipeline.schedule import learning_rate, objective_at


def settings(**changes) -> TrainingSettings:
    values = {"steps": 110, "warmup_steps": 10, "learning_rate": 1e-3, "final_learning_rate_fraction": 0.1}
    return TrainingSettings(**(values | changes))


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert [learning_rate(settings(), step) for step in range(10)] == pytest.approx([1e-4 * (step + 1) for step in range(10)])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(settings(warmup_steps=0), 0) == 1e-3


def test_cosine_falls_from_the_peak_to_the_final_rate() -> None:
    for step in range(10, 111):
        expected = 1e-4 + 9e-4 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert learning_rate(settings(), step) == pytest.approx(expected)
    assert learning_rate(settings(), 1000) == pytest.approx(1e-4)


def test_wsd_is_constant_then_falls_linearly() -> None:
    wsd = settings(schedule="wsd", decay_fraction=0.5)
    assert {learning_rate(wsd, step) for step in range(10, 56)} == {1e-3}
    assert learning_rate(wsd, 55 + 11) == pytest.approx(1e-3 - 9e-4 * 11 / 55)
    assert learning_rate(wsd, 110) == pytest.approx(1e-4)


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    for schedule in ("cosine", "wsd"):
        short = settings(steps=5, schedule=schedule)
        assert [learning_rate(short, step) for step in range(5)] == pytest.approx([1e-4 * (step + 1) for step in range(5)])


def objectives(**training) -> list[tuple[float, list[float]]]:
    """(k_percent, head weights) of the first seven steps."""
    found = Settings.model_validate({"training": training, "model": {"num_prediction_heads": 2}})
    return [(each.k_percent, list(each.head_weights)) for each in (objective_at(found, step) for step in range(7))]


def test_constant_settings_of_the_objective_stay() -> None:
    assert objectives() == [(0.6, [1.0, 1.0])] * 7
    assert objectives(head_weights=[1, 0.5], k_percent=1) == [(1.0, [1.0, 0.5])] * 7


def test_a_stepwise_course_changes_at_its_steps_and_its_last_piece_stays() -> None:
    found = objectives(head_weights=[[0, [1, 0]], [2, [1, 1]], [3, [0, 1]]], k_percent=[[0, 1], [4, 0.5]])
    assert [weights for _, weights in found] == [[1, 0], [1, 0], [1, 1], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert [k_percent for k_percent, _ in found] == [1, 1, 1, 1, 0.5, 0.5, 0.5]


def test_a_linear_course_goes_straight_from_piece_to_piece() -> None:
    found = objectives(
        head_weights=[[0, [1, 0]], [4, [0, 2]]],
        head_weights_change="linear",
        k_percent=[[0, 1], [2, 0.5], [4, 0.75]],
        k_percent_change="linear",
    )
    assert [weights for _, weights in found] == [[1, 0], [0.75, 0.5], [0.5, 1], [0.25, 1.5], [0, 2], [0, 2], [0, 2]]
    assert [k_percent for k_percent, _ in found] == [1, 0.75, 0.5, 0.625, 0.75, 0.75, 0.75]


def test_in_the_selections_warm_up_everything_is_selected() -> None:
    assert [k_percent for k_percent, _ in objectives(selection_warmup_steps=3)] == [1, 1, 1, 0.6, 0.6, 0.6, 0.6]
