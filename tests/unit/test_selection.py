"""The selection against a sort, on one process and on several."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.weighting.exchange import select_by_radix
from pipeline.weighting.pools import select_local, select_shared, select_top_of_each
from pipeline.weighting.selection import (
    INVALID_KEY,
    excess_keys,
    excess_of_key,
    num_selected,
    nums_selected,
    select_all,
    select_top,
    shifted_reference_loss,
)
from tests.counting import CountLaunches

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def top_by_sorting(excess: list[float], valid: list[bool], count: int) -> list[bool]:
    order = sorted((i for i, is_valid in enumerate(valid) if is_valid), key=lambda i: (-excess[i], i))
    chosen = set(order[:count])
    return [i in chosen for i in range(len(excess))]


@given(FLOATS, FLOATS)
def test_keys_order_as_the_floats_do(a: float, b: float) -> None:
    key_a, key_b = excess_keys(torch.tensor([a, b]), torch.ones(2, dtype=torch.bool)).tolist()
    assert (key_a < key_b, key_a == key_b) == (a < b, a == b)


@given(FLOATS)
def test_a_key_gives_its_float_back(value: float) -> None:
    keys = excess_keys(torch.tensor([value]), torch.ones(1, dtype=torch.bool))
    assert excess_of_key(keys).item() == value


def test_invalid_and_non_finite_pairs_lie_below_every_float() -> None:
    values = torch.tensor([-3.4028235e38, math.nan, math.inf, -math.inf, 5.0])
    keys = excess_keys(values, torch.tensor([True, True, True, True, False])).tolist()
    assert keys[0] > max(keys[1:])
    assert keys[4] == INVALID_KEY
    assert len(set(keys[1:4])) == 1


@pytest.mark.parametrize(
    ("k_percent", "num_valid", "expected"),
    [(0.6, 0, 0), (0.6, 1, 1), (0.01, 7, 1), (0.5, 5, 3), (0.6, 1023, 614), (1.0, 9, 9), (0.25, 2, 1)],
)
def test_the_number_selected_is_rounded_half_up_and_at_least_one(k_percent, num_valid, expected) -> None:
    assert num_selected(k_percent, num_valid) == expected


@given(st.floats(0.001, 1), st.integers(1, 10**9))
def test_the_number_selected_is_within_half_a_pair_of_the_fraction(k_percent: float, num_valid: int) -> None:
    selected = num_selected(k_percent, num_valid)
    assert 1 <= selected <= num_valid
    assert selected == 1 or abs(selected - Fraction(k_percent) * num_valid) <= Fraction(1, 2) + Fraction(num_valid, 2**50)


@given(st.lists(st.tuples(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]) | FLOATS, st.booleans()), min_size=1), st.data())
def test_the_top_equals_a_sort_with_ties_in_order(pairs: list[tuple[float, bool]], data: st.DataObject) -> None:
    excess, valid = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    count = data.draw(st.integers(0, sum(valid)))
    selected, threshold = select_top(excess_keys(torch.tensor(excess), torch.tensor(valid)), count)
    expected = top_by_sorting(excess, valid, count)
    assert selected.tolist() == expected
    if count:
        assert threshold.item() == min(value for value, chosen in zip(excess, expected, strict=True) if chosen)
    else:
        assert threshold.isnan()


@given(st.lists(st.integers(0, 10**7), min_size=1), st.floats(0.001, 1))
def test_sizes_on_the_device_equal_those_in_python(counts: list[int], k_percent: float) -> None:
    assert nums_selected(k_percent, torch.tensor(counts)).tolist() == [num_selected(k_percent, count) for count in counts]


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 2**32))
def test_each_row_is_a_pool_of_its_own(num_rows: int, num_tokens: int, k_percent: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    excess = torch.randint(-2, 3, (num_rows, num_tokens, 3), generator=generator).float()
    valid = torch.rand(excess.shape, generator=generator) < 0.7
    counts = nums_selected(k_percent, valid.sum(1))
    selected, threshold, finite = select_top_of_each(excess_keys(excess, valid), counts)
    assert finite
    for row in range(num_rows):
        for head in range(3):
            values, are_valid = excess[row, :, head].tolist(), valid[row, :, head].tolist()
            expected = top_by_sorting(values, are_valid, int(counts[row, head]))
            assert selected[row, :, head].tolist() == expected
            chosen = [value for value, taken in zip(values, expected, strict=True) if taken]
            found = threshold[row, head].item()
            assert found == min(chosen) if chosen else math.isnan(found)


def test_rows_are_selected_from_in_as_many_operations_whatever_their_number() -> None:
    """Sixteen rows of 128 tokens took seven times as long as one pool of them all when each was a call of its own."""
    operations = []
    for num_rows in (2, 16):
        scores = torch.randn(num_rows, 128, 3)
        with CountLaunches() as counts:
            select_local(scores, torch.ones_like(scores, dtype=torch.bool), 0.6, "row")
        operations.append(counts.launches.total())
    assert operations[0] == operations[1]


def test_all_equal_excesses_are_taken_from_the_front() -> None:
    selected, _ = select_top(excess_keys(torch.zeros(10), torch.ones(10, dtype=torch.bool)), 4)
    assert selected.tolist() == [True] * 4 + [False] * 6


def test_the_shifted_reference_is_the_loss_of_the_target_token() -> None:
    token_loss_BT = torch.arange(12.0).view(2, 6)
    shifted = shifted_reference_loss(token_loss_BT, num_heads=4)
    for b in range(2):
        for t in range(6):
            for h in range(4):
                expected = token_loss_BT[b, t + 1 + h] if t + 1 + h < 6 else 0.0
                assert shifted[b, t, h] == expected


def test_without_a_reference_every_valid_pair_is_selected() -> None:
    valid = torch.tensor([[[True], [False]]])
    selection = select_all(torch.ones(1, 2, 1), valid)
    assert torch.equal(selection.selected_BTK, valid)
    assert selection.finite


@pytest.mark.parametrize("tokens", [64, 2**19])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_the_pool_of_a_rank_selects_what_a_shared_pool_alone_does(tokens: int, share: float) -> None:
    """There few pairs go by `all_gather`, many by `radix`; on a device, where counts are not waited for, all do."""
    generator = torch.Generator().manual_seed(tokens)
    excess = torch.randint(-50, 50, (1, tokens, 2), generator=generator) / 8
    valid = torch.rand(excess.shape, generator=generator) < share
    counts = valid.sum((0, 1)).tolist()
    (shared,) = select_shared(excess[None], valid[None], [counts], [num_selected(0.6, n) for n in counts], "auto", None)
    own = select_local(excess, valid, 0.6, "rank")
    assert torch.equal(own.selected_BTK, shared.selected_BTK)
    assert torch.equal(own.threshold_K.nan_to_num(9e9), shared.threshold_K.nan_to_num(9e9))
    by_radix, threshold_K, _ = select_by_radix(
        excess_keys(excess, valid)[None], torch.tensor([num_selected(0.6, n) for n in counts]), None
    )
    assert torch.equal(by_radix[0], own.selected_BTK)
    assert torch.equal(threshold_K.nan_to_num(9e9), own.threshold_K.nan_to_num(9e9))
