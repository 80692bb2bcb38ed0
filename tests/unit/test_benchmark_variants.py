"""`launch/benchmark.py heads` where a variant fails, where one computes something else, and in the dtype of training."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.benchmark import plan, step
from pipeline.benchmark.heads import CHECKED_ROUND, WARM_UP_ROUNDS, figures_of, prepare, table

ABOUT = {
    "shape": {"tokens": 8, "dim": 2, "vocabulary": 16, "heads": 4, "threads": 1},
    "device": "cpu",
    "torch": "2.11",
}


def rounds(gradient: float = 1.0, hit_rates: tuple[float, ...] = ()) -> list[dict[str, Any]]:
    measured: dict[str, Any] = {"seconds": 0.5, "peak_bytes": 4, "hit_rates": list(hit_rates)}
    return [measured | {"gradients": [np.full(3, gradient)]} for _ in range(WARM_UP_ROUNDS + 1)]


def test_a_gradient_that_differs_is_named_and_leaves_the_other_variants() -> None:
    measured = {"plain": rounds(), "two_pass": rounds(1.5), "predicted": rounds(hit_rates=(0.5, 1.0)), "one_head": rounds()}
    figures = figures_of(measured, {})
    assert list(figures["variants"]) == ["plain", "predicted", "one_head"]
    assert figures["failed"] == {"two_pass": "its gradient differs from that of plain by 5.0e-01 of its norm"}
    assert figures["hit_rate"] == {"mean": 0.75, "least": 0.5, "most": 1.0}
    assert "two_pass was not measured: its gradient differs" in table(figures | ABOUT)


@pytest.mark.parametrize("failing", ["predicted", "one_head"])
def test_the_table_has_what_is_left_where_a_variant_failed(failing: str) -> None:
    measured = {name: rounds(hit_rates=(0.5,)) for name in ("plain", "predicted", "one_head") if name != failing}
    figures = figures_of(measured, {failing: "OutOfMemoryError: CUDA out of memory."})
    assert figures["peak_ratio_to_one_head"] is None
    printed = table(figures | ABOUT)
    assert f"{failing} was not measured: OutOfMemoryError: CUDA out of memory." in printed
    assert ("prediction hit rate 0.500" in printed) == (failing == "one_head")


def test_one_head_predicts_nothing_and_is_measured_all_the_same() -> None:
    one_round = prepare("predicted", 16, 8, 32, 1, torch.get_num_threads())
    measured = {"plain": rounds(), "predicted": [one_round(number) | {"gradients": [np.ones(3)]} for number in range(3)]}
    figures = figures_of(measured, {})
    assert figures["hit_rate"] is None
    assert "hit rate" not in table(figures | ABOUT)


@pytest.mark.parametrize("name", ["plain", "two_pass", "predicted"])
def test_the_loss_phase_is_measured_in_bfloat16_as_well(name: str) -> None:
    exact, rounded = (prepare(name, 64, 16, 32, 4, torch.get_num_threads(), dtype) for dtype in (torch.float32, torch.bfloat16))
    for number in range(CHECKED_ROUND):
        exact(number), rounded(number)
    gradients = [each(CHECKED_ROUND)["gradients"] for each in (exact, rounded)]
    # Bfloat16 keeps 8 bits, and takes a few pairs that float32 does not; it is not the same number either.
    for expected, found in zip(*gradients, strict=True):
        assert 0 < np.linalg.norm(found - expected) < 0.3 * np.linalg.norm(expected)
        assert np.array_equal(found, torch.from_numpy(found).bfloat16().float().numpy())


def test_tables_of_steps_name_what_failed() -> None:
    failed = {"origin": "OutOfMemoryError: CUDA out of memory."}
    said = "origin was not measured: OutOfMemoryError: CUDA out of memory."
    assert said in step.table({"variants": {}, "failed": failed, "device": "a card"})
    card = {"device": "a card", "torch": "2.11", "matrix_flops": 1e12, "memory_bandwidth": 1e9}
    assert said in plan.table(card | {"shapes": [], "failed": failed})
