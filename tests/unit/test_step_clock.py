"""The clock of a run's steps, on a time that the test sets."""

import pytest

from pipeline import step_clock
from pipeline.step_clock import StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [100.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])
    return now


def test_what_lies_between_steps_is_no_steps_time_but_counts_for_the_time_left(now: list[float]) -> None:
    clock = StepClock()
    for step in range(1, 4):
        now[0] += 10.0 if step == 1 else 2.0
        clock.end_step(step, tokens=60, waited=1.0)
        now[0] += 3.0  # a validation
        clock.restart()
    assert clock.recent() == (180 / 14, 14 / 3, 3 / 14)
    # From the end of the first step, whose warm-up does not come again.
    assert clock.seconds_a_step(3) == (3 + 2 + 3 + 2 + 3) / 2


def test_speed_is_that_of_the_last_twenty_steps(now: list[float]) -> None:
    clock = StepClock()
    for step in range(1, 31):
        now[0] += 100.0 if step <= 10 else 1.0
        clock.end_step(step, tokens=5, waited=0.0)
    assert clock.recent() == (5.0, 1.0, 0.0)


def test_the_first_step_is_all_that_is_known_of_the_speed_after_it(now: list[float]) -> None:
    clock = StepClock()
    assert clock.first is None
    now[0] += 4.0
    clock.end_step(7, tokens=5, waited=0.0)
    assert clock.first == (7, 104.0)
    assert clock.seconds_a_step(7) == 4.0
