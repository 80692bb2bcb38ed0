"""Timing: variants take turns, each in its process where it is asked for, and one that fails or dies is named."""

import math
import os
import signal
from typing import Any

import pytest
import torch

from pipeline.benchmark.timing import (
    VariantError,
    in_processes,
    in_turn,
    measured_in_processes,
    median_ratio,
    slowest,
    stopwatch,
    timed,
)
from tests.forked import forked_where_spawned


def test_variants_take_turns_round_by_round() -> None:
    called: list[str] = []
    rounds = {name: stopwatch(lambda name=name: called.append(name), before=lambda: called.append("-")) for name in "ab"}
    seconds = in_turn(rounds, 3)
    assert called == ["-", "a", "-", "b"] * 3
    assert {name: len(of_variant) for name, of_variant in seconds.items()} == {"a": 3, "b": 3}


def prepare_counting(name: str, start: int) -> Any:
    if name == "broken":
        raise ValueError("no such thing here")
    return lambda number: (name, start + number)


def prepare_to_die(name: str, last_round: int) -> Any:
    def one_round(number: int) -> int:
        if number == last_round:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return one_round


def test_variants_in_processes_of_their_own_take_turns_too() -> None:
    with in_processes(prepare_counting, [("a", 10), ("b", 20)]) as rounds:
        assert in_turn(rounds, 2) == {"a": [("a", 10), ("a", 11)], "b": [("b", 20), ("b", 21)]}


def test_a_variant_that_fails_is_named_with_its_reason() -> None:
    with (
        pytest.raises(RuntimeError, match=r"variant broken failed in round 0:[\s\S]*no such thing here"),
        in_processes(prepare_counting, [("a", 10), ("broken", 0)]) as rounds,
    ):
        in_turn(rounds, 2)


@pytest.mark.timeout(60)
def test_a_variant_that_is_killed_is_named_with_its_exit_code_and_waited_for_no_longer() -> None:
    with (
        pytest.raises(RuntimeError, match=r"variant b died in round 1: killed by SIGKILL \(exit code -9\)"),
        in_processes(prepare_to_die, [("a", 9), ("b", 1)]) as rounds,
    ):
        in_turn(rounds, 3)


def prepare_faults(name: str, fault: str) -> Any:
    if fault == "raises":
        raise ValueError("no room\nsomething about debugging")
    return prepare_to_die(name, 1 if fault == "dies" else 9)


def test_variants_that_fail_or_die_leave_the_others_and_their_turns() -> None:
    variants = [("first", "none"), ("broken", "raises"), ("killed", "dies"), ("last", "none")]
    with forked_where_spawned():
        measured, failed = measured_in_processes(prepare_faults, variants, 3)
    assert measured == {"first": [0, 1, 2], "last": [0, 1, 2]}
    assert failed == {"broken": "ValueError: no room", "killed": "died in round 1: killed by SIGKILL (exit code -9)"}


def test_the_failure_of_what_the_others_are_compared_with_is_raised() -> None:
    def fail(number: int) -> None:
        raise VariantError("variant plain failed", "no room")

    with pytest.raises(VariantError, match="variant plain failed"):
        in_turn({"plain": fail}, 1, {}, needed="plain")


def test_a_runs_time_is_the_slowest_ranks_and_ratios_are_taken_run_by_run() -> None:
    assert slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]
    assert median_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    assert math.isclose(median_ratio([3.0], [2.0]), 1.5)


def test_the_peak_is_what_the_work_needs_above_what_was_there() -> None:
    kept = torch.ones(2**24)  # 64 MiB

    def work() -> float:
        return torch.ones(2**23).sum().item()  # 32 MiB, let go again

    assert torch.ones(2**25).all()  # 128 MiB: a higher peak, but an earlier one
    for _ in range(3):
        result, seconds, peak = timed(work, torch.device("cpu"))
        assert result == 2**23
        assert seconds > 0
        assert 31 * 2**20 < peak < 40 * 2**20
    assert kept.sum().item() == 2**24
