"""Sums over micro-batches and ranks against plain arithmetic over all pairs at once."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.metrics import (
    EXCESS_BIN_WIDTH,
    EXCESS_BINS,
    EXCESS_LOWEST,
    SelectionSums,
    excess_bin,
    excess_percentiles,
)
from pipeline.weighting.loss_phase import HeadLosses
from pipeline.weighting.score import Comparison
from pipeline.weighting.selection import Selection
from tests.ranks import run_ranks
from tests.waits import waiting_for_cuda_raises

ROWS, TOKENS, HEADS, SOURCES = 2, 90, 4, ("prose", "noise")


def micro_batch(seed: int) -> tuple[HeadLosses, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(ROWS, TOKENS, HEADS, generator=generator) < 0.2 + 0.3 * (seed % 3)
    policy_loss = torch.rand(valid.shape, generator=generator) * 9 * valid
    excess = torch.randn(ROWS, TOKENS, HEADS - 1, generator=generator) * 3 * valid[..., 1:]
    selected = valid[..., 1:] & (excess > 0.3)
    threshold = torch.tensor([0.3, 0.4, 0.5]) + seed
    weight = valid[..., 1:].sum((0, 1)).double()
    selection = Selection(selected, threshold, weight, excess, torch.tensor(True))
    sources = torch.randint(2, (ROWS, TOKENS), generator=generator)
    # The last micro-batch has nothing predicted, as the first of a run has.
    predicted = None if seed == 3 else valid[..., 1:] & (excess > 0.3 * seed)
    return HeadLosses(torch.zeros(()), policy_loss, selection, predicted), valid, sources


def record_of(seeds: list[int]) -> dict[str, Any]:
    sums = SelectionSums(HEADS, len(SOURCES), torch.device("cpu"))
    for seed in seeds:
        sums.add(*micro_batch(seed))
    return sums.record([0.1, 0.2, 0.3, 0.4], SOURCES, dist.group.WORLD)


def two_micro_batches() -> dict[str, Any]:
    return record_of([2 * dist.get_rank(), 2 * dist.get_rank() + 1])


def naive_statistics(
    valid: torch.Tensor, selected: torch.Tensor, loss: torch.Tensor, excess: torch.Tensor
) -> dict[str, float | None]:
    """Of pairs [N, H], each quantity from its definition."""
    found: dict[str, Any] = {}

    def of_selecting(heads: list[int], suffix: str) -> None:
        values = torch.cat([excess[:, head - 1][valid[:, head]] for head in heads])
        chosen = torch.cat([loss[:, head][selected[:, head]] for head in heads])
        rejected = torch.cat([loss[:, head][valid[:, head] & ~selected[:, head]] for head in heads])
        found[f"excess_mean{suffix}"] = values.mean().item()
        for percent in (10, 50, 90):
            found[f"excess_p{percent}{suffix}"] = values.sort().values[-(-percent * len(values) // 100) - 1].item()
        found[f"selected_loss{suffix}"] = chosen.mean().item()
        found[f"rejected_loss{suffix}"] = rejected.mean().item()

    for head in range(HEADS):
        here, chosen = valid[:, head], selected[:, head]
        found[f"loss_head_{head}"] = loss[:, head][here].mean().item()
        found[f"valid_count_head_{head}"] = here.sum().item()
        found[f"selected_count_head_{head}"] = chosen.sum().item()
        found[f"selected_ratio_head_{head}"] = chosen.sum().item() / here.sum().item()
        if head:
            of_selecting([head], f"_head_{head}")
    of_selecting(list(range(1, HEADS)), "")
    shared = either = 0
    for one in range(1, HEADS):
        for other in range(one + 1, HEADS):
            both = int((selected[:, one] & selected[:, other]).sum())
            union = int((selected[:, one] | selected[:, other]).sum())
            found[f"agreement_head_{one}_head_{other}"] = both / union
            shared, either = shared + both, either + union
    found["agreement"] = shared / either
    found["valid_count"], found["selected_count"] = valid.sum().item(), selected.sum().item()
    found["selection_ratio"] = selected.sum().item() / valid.sum().item()
    found["heads_per_position"] = selected.sum().item() / valid[:, 0].sum().item()
    return found


def test_the_record_is_that_of_all_pairs_of_all_ranks_and_micro_batches() -> None:
    first, second = run_ranks(two_micro_batches, 2)
    assert first == second
    parts = [micro_batch(seed) for seed in range(4)]
    valid = torch.cat([valid for _, valid, _ in parts]).flatten(0, 1)
    loss = torch.cat([losses.policy_loss_BTH for losses, _, _ in parts]).flatten(0, 1).double()
    later = torch.cat([losses.selection.selected_BTK for losses, _, _ in parts]).flatten(0, 1)
    excess = torch.cat([losses.selection.excess_BTK for losses, _, _ in parts]).flatten(0, 1).double()  # type: ignore[misc]
    sources = torch.cat([sources for _, _, sources in parts]).flatten()
    selected = torch.cat([valid[:, :1], later], dim=-1)
    expected = naive_statistics(valid, selected, loss, excess)
    for number, name in enumerate(SOURCES):
        of_source = sources == number
        naive = naive_statistics(valid[of_source], selected[of_source], loss[of_source], excess[of_source])
        expected |= {f"{key}_source_{name}": value for key, value in naive.items()}
        for head in range(1, HEADS):
            # Among the selected pairs, and among all: the shares that are of this source.
            among = [pairs[of_source, head].sum().item() / pairs[:, head].sum().item() for pairs in (selected, valid)]
            expected[f"enrichment_head_{head}_source_{name}"] = among[0] / among[1]
    scales = zip([0.1, 0.2, 0.3, 0.4], loss.where(selected, 0).sum(0).tolist(), strict=True)
    expected["loss"] = sum(scale * total for scale, total in scales)
    for head in range(1, HEADS):
        thresholds = [(losses.selection.threshold_K[head - 1].item(), v[..., head].sum().item()) for losses, v, _ in parts]
        mean = sum(value * weight for value, weight in thresholds) / sum(weight for _, weight in thresholds)
        expected[f"threshold_head_{head}"] = mean
        guesses = [(losses.predicted_BTK, losses.selection.selected_BTK) for losses, _, _ in parts]
        right, made = (
            sum(
                join(predicted, selected)[..., head - 1].sum().item()
                for predicted, selected in guesses
                if predicted is not None
            )
            for join in (torch.logical_and, torch.logical_or)
        )
        expected[f"prediction_hit_rate_head_{head}"] = right / made
        assert 0.5 < right / made < 1
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        exact = "excess_p" not in key
        assert first[key] == pytest.approx(value, abs=1e-9 if exact else EXCESS_BIN_WIDTH / 2), key


def test_a_percentile_is_the_bin_of_the_value_of_that_rank() -> None:
    middles = torch.arange(EXCESS_BINS) * EXCESS_BIN_WIDTH + EXCESS_LOWEST + EXCESS_BIN_WIDTH / 2
    for count in (1, 2, 9, 10, 11, 30, 70, 100, 101, 230):
        excess = middles[torch.arange(count)]
        counts = torch.zeros(1, EXCESS_BINS).double().index_add_(1, excess_bin(excess), torch.ones(1, count).double())
        ranks = [-(-percent * count // 100) for percent in (10, 50, 90)]
        assert excess_percentiles(counts) == [[middles[rank - 1].item() for rank in ranks]]


def test_values_outside_the_histogram_count_in_the_outermost_bins() -> None:
    assert excess_bin(torch.tensor([-1e30, -16.0, -0.01, 0.0, 15.99, 16.0, 3e38])).tolist() == [0, 0, 255, 256, 511, 511, 511]


def one_bad_number(where: str, value: float) -> dict[str, Any]:
    """The second rank alone has a number that is not finite: of head 1, at a valid pair of the source `prose`."""
    losses, valid, sources = micro_batch(1)
    row, position = ((valid[..., 1]) & (sources == 0)).nonzero()[0].tolist()
    if dist.get_rank() == 1:
        assert losses.selection.excess_BTK is not None
        losses.selection.excess_BTK[row, position, 0] = value
        if where == "policy loss":
            losses.policy_loss_BTH[row, position, 1] = value
    sums = SelectionSums(HEADS, len(SOURCES), torch.device("cpu"))
    sums.add(losses, valid, sources)
    return sums.record([0.1] * HEADS, SOURCES, dist.group.WORLD)


def records_with_bad_numbers() -> list[dict[str, Any]]:
    cases = [("no loss", 0.0)] + [(where, value) for where in ("policy loss", "excess") for value in NOT_FINITE]
    return [one_bad_number(*case) for case in cases]


NOT_FINITE = (math.nan, math.inf, -math.inf)


def test_what_a_number_that_is_not_finite_belongs_to_is_none_and_nothing_else() -> None:
    (good, *bad), others = run_ranks(records_with_bad_numbers, 2)
    assert [good, *bad] == others
    assert None not in good.values()
    chosen_by_head_1 = [f"excess_p{p}" for p in (10, 50, 90)] + ["excess_mean", "selected_loss", "rejected_loss"]
    spoilt = {
        f"{key}{head}{source}" for key in chosen_by_head_1 for head in ("_head_1", "") for source in ("", "_source_prose")
    }
    spoilt |= {"loss", "threshold_head_1"}
    for record in bad:
        loss_itself = {"loss_head_1", "loss_head_1_source_prose"} if record in bad[:3] else set()
        assert {key for key, value in record.items() if value is None} == spoilt | loss_itself
        for key, value in record.items():
            assert value is None or value == good[key], key


def test_without_a_reference_there_is_no_excess() -> None:
    losses, valid, sources = micro_batch(1)
    sums = SelectionSums(HEADS, len(SOURCES), torch.device("cpu"))
    sums.add(losses._replace(selection=losses.selection._replace(excess_BTK=None)), valid, sources)
    record = sums.record([0.1] * HEADS, SOURCES, None)
    assert {key for key, value in record.items() if value is None} == {key for key in record if key.startswith("excess")}
    assert len([key for key in record if key.startswith("excess")]) == 4 * HEADS * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adding_to_the_sums_does_not_wait_for_the_device() -> None:
    losses, valid, sources = micro_batch(1)
    selection = Selection(*(part.cuda() for part in losses.selection if part is not None))
    on_device = HeadLosses(losses.loss.cuda(), losses.policy_loss_BTH.cuda(), selection)
    valid, sources, sums = valid.cuda(), sources.cuda(), SelectionSums(HEADS, len(SOURCES), torch.device("cuda", 0))
    with waiting_for_cuda_raises():
        sums.add(on_device, valid, sources)
    assert sums.record([0.1] * HEADS, SOURCES, None)["valid_count_head_0"] == valid[..., 0].sum().item()


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


def test_a_loss_that_is_not_finite_is_the_policys_the_references_or_both() -> None:
    policy, reference = torch.ones(4, 1, 3), torch.ones(4, 1, 2)
    policy[0, 0, 0] = policy[1, 0, 1] = policy[3, 0, 2] = torch.nan
    reference[2, 0, 0], reference[3, 0, 1] = torch.inf, -torch.inf
    valid = torch.ones(4, 1, 3, dtype=torch.bool)
    excess = Comparison("excess", valid[..., 1:], reference, None).excess(policy[..., 1:])
    selection = Selection(valid[..., 1:], torch.zeros(2), torch.ones(2, dtype=torch.float64), excess, torch.tensor(True))
    sums = SelectionSums(3, 1, torch.device("cpu"))
    sums.add(HeadLosses(torch.zeros(()), policy, selection, None), valid, torch.zeros(4, 1, dtype=torch.int64))
    ((of_policy, of_reference),) = sums.bad_rows
    assert of_policy.nonzero().tolist() == [[0, 0], [1, 1], [3, 2]]
    assert of_reference.nonzero().tolist() == [[2, 1], [3, 2]]
    assert not sums.finite
