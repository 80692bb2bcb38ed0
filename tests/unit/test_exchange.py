"""Shared pools on several ranks, through both exchanges, against a sort of the whole pool: mask and threshold, bit for bit."""

import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import pipeline.weighting.exchange as exchange
from pipeline.weighting.exchange import exchange_named, select_by_gathering, select_by_radix
from pipeline.weighting.pools import random_scores, score, select_local, select_shared
from pipeline.weighting.selection import excess_keys, num_selected
from tests.ranks import run_ranks
from tests.unit.test_selection import top_by_sorting

ROWS, HEADS = 2, 3
EXCHANGES = ("all_gather", "radix")


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def one_of(*values: float) -> Callable[[tuple[int, ...], torch.Generator], torch.Tensor]:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    return draw


VALUES = {
    "distinct": normal,
    "all equal": one_of(0.0),
    "rounded to bf16": lambda shape, generator: normal(shape, generator).bfloat16().float(),
    "zeros of both signs": one_of(-0.0, 0.0, -1.0),
    "denormals": one_of(1e-45, -1e-45, 3e-45, 1e-40, -1e-40, 0.0),
    "large magnitudes": one_of(3.4028235e38, -3.4028235e38, 1e38, -1e30, 1.0),
    "neighbours": one_of(1.0, 1.0000001, 0.99999994, -1.0, -1.0000001),
}
# (values, micro-steps of the pool, tokens, k_percent); few tokens are barely more than the heads.
CASES = [(name, micro_steps, 33, 0.6) for name in VALUES for micro_steps in (1, 2)]
CASES += [("distinct", 1, 5, 0.6), ("rounded to bf16", 2, 33, 1.0), ("distinct", 2, 33, 1e-6), ("all equal", 2, 33, 1e-6)]


def pool_of(case: tuple[str, int, int, float], world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Excess and validity [M, R, B, T, K]: unequal numbers of valid pairs, a rank and a head that have none."""
    name, micro_steps, num_tokens, _ = case
    generator = torch.Generator().manual_seed(world_size)
    shape = (micro_steps, world_size, ROWS, num_tokens, HEADS)
    excess = VALUES[name](shape, generator)
    valid = torch.rand(shape, generator=generator) < torch.linspace(0.3, 0.9, world_size)[None, :, None, None, None]
    if world_size > 1:
        valid[:, world_size // 2] = False
    valid[..., 2] = False
    return excess, valid


def counts_of(case: tuple[str, int, int, float], valid: torch.Tensor) -> list[int]:
    return [num_selected(case[3], n) for n in valid.flatten(0, -2).sum(0).tolist()]


def select_all_cases() -> list[list[torch.Tensor]]:
    """For each case and exchange this rank's mask and the threshold."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for case in CASES:
        excess, valid = pool_of(case, world_size)
        keys = excess_keys(excess[:, rank], valid[:, rank])
        for name in EXCHANGES:
            found.append(
                list(exchange_named(name, keys.numel(), dist.group.WORLD)(keys, counts_of(case, valid), dist.group.WORLD))
            )
    return found


def bits(value: float) -> bytes:
    return struct.pack("<f", value + 0.0)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_select_what_a_sort_of_the_whole_pool_selects(world_size: int) -> None:
    answers = run_ranks(select_all_cases, world_size)
    for number, case in enumerate(CASES):
        excess, valid = pool_of(case, world_size)
        for way in range(len(EXCHANGES)):
            found = [answer[number * len(EXCHANGES) + way] for answer in answers]
            masks = torch.stack([mask for mask, _, _ in found], dim=1)
            for head, count in enumerate(counts_of(case, valid)):
                values, are_valid = excess[..., head].flatten().tolist(), valid[..., head].flatten().tolist()
                expected = top_by_sorting(values, are_valid, count)
                assert masks[..., head].flatten().tolist() == expected, (case, EXCHANGES[way], head)
                thresholds = [threshold[head].item() for _, threshold, _ in found]
                if count:
                    smallest = min(value for value, taken in zip(values, expected, strict=True) if taken)
                    assert {bits(threshold) for threshold in thresholds} == {bits(smallest)}
                else:
                    assert all(math.isnan(threshold) for threshold in thresholds)
            assert all(finite for _, _, finite in found)


def collectives_of_one_selection(name: str, num_valid: int) -> tuple[list[str], bool]:
    """What one selection calls, on a rank whose first `num_valid` pairs are valid; with a bad one on the last rank."""
    calls: list[str] = []
    all_reduce, gather = dist.all_reduce, exchange._gather_into_one

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(kind)
            return function(*arguments, **named)

        return call

    dist.all_reduce, exchange._gather_into_one = counted("all_reduce", all_reduce), counted("all_gather", gather)
    try:
        rank = dist.get_rank()
        valid = (torch.arange(40) < (num_valid if rank == 0 else 40)).view(1, 1, 40, 1).expand(1, 1, 40, HEADS)
        excess = torch.randn(1, 1, 40, HEADS, generator=torch.Generator().manual_seed(rank))
        if rank == dist.get_world_size() - 1:
            excess[0, 0, 3, 1] = math.nan
        select = {"all_gather": select_by_gathering, "radix": select_by_radix}[name]
        finite = select(excess_keys(excess, valid), [20] * HEADS, dist.group.WORLD)[2]
    finally:
        dist.all_reduce, exchange._gather_into_one = all_reduce, gather
    return calls, bool(finite)


def all_collectives() -> list[tuple[list[str], bool]]:
    return [collectives_of_one_selection(name, num_valid) for name in EXCHANGES for num_valid in (40, 0)]


def test_every_rank_runs_the_same_collectives_whatever_its_data_and_sees_a_bad_number() -> None:
    gathering, radix = ["all_gather"], ["all_reduce"] * 3 + ["all_gather"]
    expected = [(gathering, False), (gathering, False), (radix, False), (radix, False)]
    assert run_ranks(all_collectives, 2) == [expected, expected]


def test_auto_gathers_small_pools_and_takes_histograms_of_large_ones() -> None:
    assert exchange_named("auto", 2**18, None) is select_by_gathering
    assert exchange_named("auto", 2**18 + 1, None) is select_by_radix


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.floats(0.01, 1), st.data()
)
def test_both_exchanges_agree_on_any_floats(values: list[float], k_percent: float, data: st.DataObject) -> None:
    are_valid = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    keys = excess_keys(torch.tensor(values), torch.tensor(are_valid)).view(1, 1, -1, 1)
    count = num_selected(k_percent, sum(are_valid))
    gathered, radix = (select(keys, [count], None) for select in (select_by_gathering, select_by_radix))
    assert gathered[0].flatten().tolist() == radix[0].flatten().tolist() == top_by_sorting(values, are_valid, count)
    assert bits(gathered[1].item()) == bits(radix[1].item()) or not count


DISTINCT = st.lists(st.integers(-(2**20), 2**20), min_size=2, max_size=50, unique=True)


@given(DISTINCT, st.floats(0.01, 1), st.randoms())
def test_permuting_rows_of_distinct_excesses_only_permutes_the_result(values: list[int], k_percent: float, random: Any) -> None:
    order = list(range(len(values)))
    random.shuffle(order)
    before, after = one_pool(values, k_percent), one_pool([values[place] for place in order], k_percent)
    assert after[0] == [before[0][place] for place in order]
    assert after[1] == before[1]


@given(DISTINCT, st.floats(0.01, 1), st.integers(-(2**20), 2**20))
def test_adding_a_constant_changes_nothing_but_the_threshold(values: list[int], k_percent: float, constant: int) -> None:
    before, after = one_pool(values, k_percent), one_pool([value + constant for value in values], k_percent)
    assert after == (before[0], before[1] + constant)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=50), st.floats(0.01, 1), st.floats(0.01, 1))
def test_growing_k_only_adds_pairs(values: list[int], one: float, other: float) -> None:
    fewer, more = (one_pool(values, k_percent)[0] for k_percent in sorted((one, other)))
    assert all(later or not earlier for earlier, later in zip(fewer, more, strict=True))


def one_pool(values: list[int], k_percent: float) -> tuple[list[bool], float]:
    scores = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
    count = num_selected(k_percent, len(values))
    (found,) = select_shared(scores, torch.ones_like(scores, dtype=torch.bool), [[len(values)]], [count], "radix", None)
    return found.selected_BTK.flatten().tolist(), found.threshold_K.item()


def test_local_pools_weigh_their_thresholds_by_valid_pairs() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0], [2.0, 9.0, 7.0]])[..., None]
    valid = torch.tensor([[True, True, True], [True, False, False]])[..., None]
    by_row = select_local(scores, valid, 0.6, "row")
    assert by_row.selected_BTK[..., 0].tolist() == [[True, False, True], [True, False, False]]
    assert by_row.threshold_K.item() == pytest.approx((3 * 3.0 + 1 * 2.0) / 4)
    by_rank = select_local(scores, valid, 0.6, "rank")
    assert by_rank.selected_BTK[..., 0].tolist() == [[True, False, True], [False, False, False]]
    assert (by_rank.threshold_K.item(), by_rank.threshold_weight_K.item()) == (3.0, 4.0)
    nothing = select_local(scores, torch.zeros_like(valid), 0.6, "row")
    assert not nothing.selected_BTK.any()
    assert nothing.threshold_weight_K.item() == 0


def test_random_scores_depend_on_row_position_head_and_seed_alone() -> None:
    whole = random_scores(3, torch.arange(64), 33, 3)
    assert torch.equal(whole[10:20], random_scores(3, torch.arange(10, 20), 33, 3))
    assert not torch.equal(whole, random_scores(4, torch.arange(64), 33, 3))
    assert (whole.min() >= 0, whole.max() < 1) == (True, True)
    assert whole.mean().item() == pytest.approx(0.5, abs=0.01)
    assert len(whole.unique()) > 0.99 * whole.numel()
    neighbours = torch.corrcoef(torch.stack([whole[:, :-1].flatten(), whole[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 0.05


def test_the_controls_compete_by_other_scores_and_still_see_a_bad_loss() -> None:
    policy, excess = torch.tensor([1.0, math.nan]), torch.tensor([2.0, math.nan])
    drawn = torch.tensor([0.1, 0.2])
    assert score("policy_loss", policy, None, None)[0] == 1.0
    assert score("excess", policy, excess, None)[0] == 2.0
    assert score("random", policy, None, drawn)[0] == pytest.approx(0.1)
    for name in ("policy_loss", "excess", "random"):
        assert score(name, policy, excess, drawn)[1].isnan()
