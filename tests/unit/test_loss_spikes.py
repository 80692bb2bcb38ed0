"""The loss-spike score: against its formula, and kept to the bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.loss_spikes import FEWEST, WINDOW, Recent
from pipeline.progress import Progress
from pipeline.runtime.tensorboard import place_of


def naive_score(values: list[float]) -> float | None:
    """As OLMo-core has it: torch.std_mean of the steps before, and how far the newest lies above."""
    before = values[-1 - WINDOW : -1]
    if len(before) < FEWEST:
        return None
    deviation, mean = torch.std_mean(torch.tensor(before, dtype=torch.float64))
    return ((values[-1] - mean) / deviation).item()


@given(st.integers(0, 3 * WINDOW), st.integers(0, 2**32 - 1))
def test_it_is_the_formula_over_the_newest_steps(num_values: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(3, 0.1, num_values).tolist()
    recent = Recent()
    for value in values:
        recent.add(value)
    expected = naive_score(values)
    assert recent.score() == (None if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-9))
    assert len(recent.numbers()) == min(num_values, WINDOW + 1)


def test_a_spike_stands_out_and_then_hides_what_follows_in_its_own_deviation() -> None:
    recent = Recent([3 + 0.01 * (-1) ** step for step in range(WINDOW)])
    recent.add(4.0)
    score = recent.score()
    assert score is not None
    assert score > 90
    recent.add(4.0)
    after = recent.score()
    assert after is not None
    assert 10 < after < 12


def test_steps_that_are_all_alike_have_no_score() -> None:
    recent = Recent([2.5] * WINDOW)
    recent.add(2.5)
    assert recent.score() is None
    recent.add(3.0)
    assert recent.score() is None


def test_scalars_of_a_device_and_numbers_that_were_saved_have_the_same_score_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.rand((), generator=draw) for _ in range(WINDOW + 9)]
    whole = Recent()
    for value in values:
        whole.add(value)

    # Saved and restored on the way, each time before other steps have been asked for.
    progress = Progress()
    for step, value in enumerate(values):
        progress.losses.add(value)
        progress.gradient_norms.add(value.item())
        if step % 50 == 49:
            progress = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert progress.losses.score() == progress.gradient_norms.score() == whole.score()
    assert progress.losses.numbers() == whole.numbers() == [value.item() for value in values[-1 - WINDOW :]]


def test_a_tensor_that_is_changed_later_was_counted_as_it_was() -> None:
    recent, norm = Recent(), torch.tensor(1.5)
    recent.add(norm)
    norm += 1
    assert recent.numbers() == [1.5]


def test_what_an_older_checkpoint_does_not_have_begins_anew() -> None:
    older = {"step": 7, "samples": 56}
    progress = Progress.from_json(older)
    assert (progress.losses.numbers(), progress.rollbacks, progress.samples_skipped) == ([], 0, 0)


def test_the_scores_are_curves_of_training() -> None:
    keys = ("loss_spike_score", "grad_norm_spike_score", "rollbacks", "samples_skipped")
    assert [place_of(key) for key in keys] == [("", f"train/{key}") for key in keys]
