"""Sums over micro-batches and ranks against plain arithmetic over all pairs at once."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.metrics import EXCESS_BIN_WIDTH, SelectionSums
from pipeline.weighting.loss_phase import HeadLosses
from pipeline.weighting.selection import Selection
from tests.ranks import run_ranks

ROWS, TOKENS, HEADS, SOURCES = 2, 40, 3, ("prose", "noise")


def micro_batch(seed: int) -> tuple[HeadLosses, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(ROWS, TOKENS, HEADS, generator=generator) < 0.2 + 0.3 * (seed % 3)
    policy_loss = torch.rand(valid.shape, generator=generator) * 9 * valid
    excess = torch.randn(ROWS, TOKENS, HEADS - 1, generator=generator) * 3 * valid[..., 1:]
    selected = valid[..., 1:] & (excess > 0.3)
    threshold = torch.tensor([0.3, 0.4]) + seed
    weight = valid[..., 1:].sum((0, 1)).double()
    selection = Selection(selected, threshold, weight, excess, torch.tensor(True))
    sources = torch.randint(2, (ROWS, TOKENS), generator=generator)
    # The last micro-batch has nothing foreseen, as the first of a run has.
    foreseen = None if seed == 3 else valid[..., 1:] & (excess > 0.3 * seed)
    return HeadLosses(torch.zeros(()), policy_loss, selection, foreseen), valid, sources


def record_of(seeds: list[int]) -> dict[str, Any]:
    sums = SelectionSums(HEADS, len(SOURCES), torch.device("cpu"))
    for seed in seeds:
        sums.add(*micro_batch(seed))
    return sums.record([0.1, 0.2, 0.3], SOURCES, dist.group.WORLD)


def two_micro_batches() -> dict[str, Any]:
    return record_of([2 * dist.get_rank(), 2 * dist.get_rank() + 1])


def test_the_record_is_that_of_all_pairs_of_all_ranks_and_micro_batches() -> None:
    first, second = run_ranks(two_micro_batches, 2)
    assert first == second
    parts = [micro_batch(seed) for seed in range(4)]
    valid = torch.cat([valid for _, valid, _ in parts])
    loss = torch.cat([losses.policy_loss_BTH for losses, _, _ in parts]).double()
    later = torch.cat([losses.selection.selected_BTK for losses, _, _ in parts])
    excess = torch.cat([losses.selection.excess_BTK for losses, _, _ in parts]).double()  # type: ignore[misc]
    sources = torch.cat([sources for _, _, sources in parts])
    selected = torch.cat([valid[..., :1], later], dim=-1)
    objective = 0.0
    for head in range(HEADS):
        here, chosen = valid[..., head], selected[..., head]
        objective += [0.1, 0.2, 0.3][head] * loss[..., head][chosen].sum().item()
        assert first[f"loss_head_{head}"] == pytest.approx(loss[..., head][here].mean().item())
        assert first[f"selected_count_head_{head}"] == chosen.sum()
        assert first[f"selected_ratio_head_{head}"] == pytest.approx((chosen.sum() / here.sum()).item())
        for number, name in enumerate(SOURCES):
            of_source = sources == number
            assert first[f"valid_count_head_{head}_source_{name}"] == (here & of_source).sum()
            assert first[f"selected_count_head_{head}_source_{name}"] == (chosen & of_source).sum()
        if head == 0:
            continue
        values = excess[..., head - 1][here]
        assert first[f"excess_mean_head_{head}"] == pytest.approx(values.mean().item())
        for percent in (10, 50, 90):
            exact = values.sort().values[math.ceil(percent / 100 * len(values)) - 1].item()
            assert abs(first[f"excess_p{percent}_head_{head}"] - exact) <= EXCESS_BIN_WIDTH / 2
        assert first[f"selected_loss_head_{head}"] == pytest.approx(loss[..., head][chosen].mean().item())
        assert first[f"rejected_loss_head_{head}"] == pytest.approx(loss[..., head][here & ~chosen].mean().item())
        guesses = [(losses.foreseen_BTK, losses.selection.selected_BTK) for losses, _, _ in parts]
        right, made = (
            sum(join(foreseen, selected)[..., head - 1].sum().item() for foreseen, selected in guesses if foreseen is not None)
            for join in (torch.logical_and, torch.logical_or)
        )
        assert first[f"prediction_hit_rate_head_{head}"] == pytest.approx(right / made)
        assert 0.5 < right / made < 1
        thresholds = [(losses.selection.threshold_K[head - 1].item(), v[..., head].sum().item()) for losses, v, _ in parts]
        mean = sum(value * weight for value, weight in thresholds) / sum(weight for _, weight in thresholds)
        assert first[f"threshold_head_{head}"] == pytest.approx(mean)
    assert first["loss"] == pytest.approx(objective)
    both, either = selected[..., 1] & selected[..., 2], selected[..., 1] | selected[..., 2]
    assert first["agreement_head_1_head_2"] == pytest.approx((both.sum() / either.sum()).item())
    assert first["selection_ratio"] == pytest.approx((selected.sum() / valid.sum()).item())
    assert first["heads_per_position"] == pytest.approx((selected.sum() / valid[..., 0].sum()).item())


def nothing_valid() -> dict[str, Any]:
    losses, valid, sources = micro_batch(0)
    selection = losses.selection._replace(
        selected_BTK=torch.zeros_like(losses.selection.selected_BTK),
        excess_BTK=torch.zeros(ROWS, TOKENS, HEADS - 1),
        threshold_K=torch.full((HEADS - 1,), math.nan),
        threshold_weight_K=torch.zeros(HEADS - 1, dtype=torch.float64),
    )
    sums = SelectionSums(HEADS, 1, torch.device("cpu"))
    sums.add(HeadLosses(losses.loss, torch.zeros(valid.shape), selection), torch.zeros_like(valid), 0 * sources)
    return sums.record([0.0] * HEADS, ("",), dist.group.WORLD)


def test_where_there_is_nothing_to_divide_by_the_value_is_none() -> None:
    (record,) = run_ranks(nothing_valid, 1)
    assert record["loss"] == 0.0
    for key in (
        "prediction_hit_rate_head_1",
        "loss_head_0",
        "threshold_head_1",
        "excess_mean_head_2",
        "excess_p50_head_1",
        "agreement_head_1_head_2",
    ):
        assert record[key] is None
    assert record["selected_count_head_1"] == 0
