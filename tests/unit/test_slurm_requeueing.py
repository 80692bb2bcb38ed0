"""The rule by which a job is put into the queue again, by what its last life left."""

from pathlib import Path

import pytest

from pipeline.slurm.commands import seconds_of
from pipeline.slurm.rank_logs import Ended
from pipeline.slurm.requeueing import (
    MOST_FAILURES,
    Decision,
    Life,
    decide,
    failures_in_a_row,
    is_slurms,
    record,
    seconds_to_wait,
)

KILLED = [Ended("n2", 1, None), Ended("n1", 0, 4)]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45", 45),
        ("2:05", 125),
        ("1:00:09\n", 3609),
        ("3-02:00:00", 3 * 86400 + 7200),
        ("-0:07", -7),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_a_time_left_is_read_as_squeue_prints_it(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("life", "requeues"),
    [
        (Life(0, True), False),
        (Life(75, True, asked_by_slurm=True), True),
        (Life(75, True, asked_by_slurm=False), False),
        (Life(75, True), False),
        (Life(75, False, asked_by_slurm=True), False),
        (Life(75, True, asked_by_slurm=True, cancelled=True), False),
        (Life(137, True, KILLED, accused="n2"), True),
        (Life(4, True, [Ended("n1", 0, 4), Ended("n2", 1, 4)]), True),
        (Life(4, True, [Ended("n2", 1, 1), Ended("n1", 0, 4)]), False),
        (Life(4, True, [Ended("n2", 1, 2), Ended("n1", 0, 4)]), False),
        (Life(2, False, [Ended("n1", 0, 2)]), False),
        (Life(3, True, [Ended("n1", 0, 3)]), False),
    ],
    ids=[
        "finished",
        "Slurm's stop",
        "a person's stop",
        "a STOP file",
        "nothing saved",
        "cancelled",
        "a rank killed",
        "a hang",
        "an exception",
        "a full disk",
        "wrong settings",
        "diverged",
    ],
)
def test_only_a_stop_of_slurms_and_a_lost_rank_are_reasons_to_go_on(life: Life, requeues: bool) -> None:
    assert decide(life, 0).requeue is requeues
    assert decide(life, 0).exclude == (life.accused if requeues else None)


def test_a_job_that_keeps_losing_ranks_and_saves_nothing_is_given_up(tmp_path: Path) -> None:
    records, lost, saved = tmp_path / "lives.jsonl", Life(4, False, KILLED), Life(137, True, KILLED)
    found = []
    for life in [lost, saved, *[lost] * MOST_FAILURES]:
        decision = decide(life, failures_in_a_row(records))
        record(records, life, decision, ["n1", "n2"])
        found.append(decision.requeue)
    assert found == [True] * (MOST_FAILURES + 1) + [False]


def test_a_torn_record_of_a_life_is_passed_over(tmp_path: Path) -> None:
    records = tmp_path / "lives.jsonl"
    record(records, Life(4, False, KILLED), Decision(True, ""), ["n1"])
    with records.open("a") as file:
        file.write('{"time": 1')
    assert failures_in_a_row(records) == 1
    record(records, Life(4, False, KILLED), Decision(True, ""), ["n1"])
    assert failures_in_a_row(records) == 2


def test_a_stop_is_slurms_where_the_limit_is_near() -> None:
    assert is_slurms(599.0, False)
    assert is_slurms(655.0, False)
    assert not is_slurms(700.0, False)
    assert not is_slurms(None, False)
    assert is_slurms(None, True)


@pytest.mark.parametrize(
    ("left", "limit", "waits"),
    [(600, 86400, 0), (1800, 86400, 0), (290, 300, 215), (600, 900, 375), (120, 300, 0), (1800, 2400, 0)],
)
def test_the_ranks_of_a_job_with_a_short_limit_are_asked_late(left: float, limit: float, waits: float) -> None:
    """Slurm signals ten minutes before the limit, which in a job of five minutes is at once."""
    assert seconds_to_wait(left, limit) == waits
