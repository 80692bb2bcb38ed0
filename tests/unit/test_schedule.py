"""The learning rate as a function of applied steps."""

import math

import pytest

from pipeline.config import TrainingSettings
from pipeline.schedule import learning_rate


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
