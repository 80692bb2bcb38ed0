"""Shared pools on several ranks, through both exchanges, against a sort of the whole pool: mask and threshold, bit for bit."""

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.weighting.exchange as exchange
from pipeline.benchmark.collectives import Collective, CollectiveRecorder
from pipeline.weighting.exchange import exchange_named, select_by_gathering, select_by_radix
from pipeline.weighting.pools import select_local, select_shared
from pipeline.weighting.score import random_scores, score
from pipeline.weighting.selection import Selection, excess_keys, num_selected
from tests.ranks import run_ranks
from tests.unit.test_selection import FLOATS, top_by_sorting
from tests.waits import waiting_for_cuda_raises

ROWS, HEADS = 2, 3
EXCHANGES, LOCAL = ("all_gather", "radix"), ("rank", "row")


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def one_of(*values: float) -> Callable[[tuple[int, ...], torch.Generator], torch.Tensor]:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    return draw


def losses_in_bf16(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Differences of losses near 10, which bf16 knows to 1/16 only: thousands of them are equal."""
    return (10 + 0.05 * normal(shape, generator)).bfloat16().float() - 9.9375


VALUES = {
    "distinct": normal,
    "all equal": one_of(0.0),
    "rounded to bf16": lambda shape, generator: normal(shape, generator).bfloat16().float(),
    "zeros of both signs": one_of(-0.0, 0.0, -1.0),
    "denormals": one_of(1e-45, -1e-45, 3e-45, 1e-40, -1e-40, 0.0),
    "large magnitudes": one_of(3.4028235e38, -3.4028235e38, 1e38, -1e30, 1.0),
    "neighbours": one_of(1.0, 1.0000001, 0.99999994, -1.0, -1.0000001),
    "losses in bf16": losses_in_bf16,
}


class Case(NamedTuple):
    """micro_steps: of a shared pool. k_percent 1 takes all, 1e-6 a single pair (m = 1)."""

    values: str
    micro_steps: int = 1
    num_tokens: int = 33
    k_percent: float = 0.6


CASES = [Case(values, micro_steps) for values in VALUES for micro_steps in (1, 2)]
CASES += [Case(values, 2, 33, k_percent) for values in VALUES for k_percent in (1.0, 1e-6)]
# Few tokens, barely more than the heads; and many that tie.
CASES += [Case("distinct", 1, HEADS + 2), Case("all equal", 2, HEADS + 2), Case("losses in bf16", 1, 1500)]


def pool_of(case: Case, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Excess and validity [M, R, B, T, K]: unequal numbers of valid pairs, a head that has none, and a rank that
    has none in the first micro-step: in a pool of one none at all, in a pool of two others to tie with."""
    generator = torch.Generator().manual_seed(world_size)
    shape = (case.micro_steps, world_size, ROWS, case.num_tokens, HEADS)
    excess = VALUES[case.values](shape, generator)
    valid = torch.rand(shape, generator=generator) < torch.linspace(0.3, 0.9, world_size)[None, :, None, None, None]
    if world_size > 1:
        valid[0, world_size // 2] = False
    valid[..., 2] = False
    return excess, valid


def counts_of(case: Case, valid: torch.Tensor) -> list[int]:
    return [num_selected(case.k_percent, n) for n in valid.flatten(0, -2).sum(0).tolist()]


def select_all_cases() -> list[dict[str, list[list[torch.Tensor]]]]:
    """For each case, exchange and local pool this rank's selections in each micro-step: mask, threshold, its weight,
    whether all was finite."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for case in CASES:
        excess, valid = pool_of(case, world_size)
        mine, num_valid = (excess[:, rank], valid[:, rank]), valid.sum((1, 2, 3)).tolist()
        shared = {name: select_shared(*mine, num_valid, counts_of(case, valid), name, dist.group.WORLD) for name in EXCHANGES}
        local = {name: [select_local(*pair, case.k_percent, name) for pair in zip(*mine, strict=True)] for name in LOCAL}
        found.append(
            {
                name: [[one.selected_BTK, one.threshold_K, one.threshold_weight_K, one.finite] for one in selections]
                for name, selections in (shared | local).items()
            }
        )
    return found


def bits(value: float) -> bytes:
    return struct.pack("<f", value + 0.0)


WORLD_SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module", params=WORLD_SIZES)
def answers(request: pytest.FixtureRequest) -> list[list[dict[str, list[list[torch.Tensor]]]]]:
    """What `select_all_cases` gives on each of 1, 2, 4 and 8 ranks."""
    return run_ranks(select_all_cases, request.param)


def test_ranks_select_what_a_sort_of_the_whole_pool_selects(answers) -> None:
    for number, case in enumerate(CASES):
        excess, valid = pool_of(case, len(answers))
        for head, count in enumerate(counts_of(case, valid)):
            values, are_valid = excess[..., head].flatten().tolist(), valid[..., head].flatten().tolist()
            expected = top_by_sorting(values, are_valid, count)
            smallest = min((value for value, taken in zip(values, expected, strict=True) if taken), default=math.nan)
            if case.num_tokens == 1500 and len(answers) >= 4 and count:
                assert (excess[..., head][valid[..., head]] == smallest).sum() > 1000
            for name in EXCHANGES:
                found = [answer[number][name] for answer in answers]
                masks = torch.stack([torch.stack([micro[0] for micro in of_rank]) for of_rank in found], dim=1)
                assert masks[..., head].flatten().tolist() == expected, (case, name, head)
                thresholds = {bits(micro[1][head].item()) for of_rank in found for micro in of_rank}
                if count:
                    assert thresholds == {bits(smallest)}, (case, name, head)
                else:
                    assert all(math.isnan(micro[1][head]) for of_rank in found for micro in of_rank)
                # The pool counts once, with all its valid pairs, on the first rank.
                weights = [sum(micro[2][head].item() for micro in of_rank) for of_rank in found]
                assert weights == [sum(are_valid), *[0] * (len(answers) - 1)]
                assert all(micro[3] for of_rank in found for micro in of_rank)


def test_each_rank_and_each_row_selects_what_a_sort_of_its_own_pairs_selects(answers) -> None:
    for number, case in enumerate(CASES):
        excess, valid = pool_of(case, len(answers))
        for name in LOCAL:
            for rank, answer in enumerate(answers):
                for micro_step, (mask, threshold, weight, finite) in enumerate(answer[number][name]):
                    assert finite
                    for head in range(HEADS):
                        pools = [(excess[micro_step, rank, ..., head], valid[micro_step, rank, ..., head])]
                        pools = [*zip(*pools[0], strict=True)] if name == "row" else pools
                        expected, thresholds = [], []
                        for values_P, valid_P in pools:
                            values, are_valid = values_P.flatten().tolist(), valid_P.flatten().tolist()
                            top = top_by_sorting(values, are_valid, num_selected(case.k_percent, sum(are_valid)))
                            taken = [value for value, is_taken in zip(values, top, strict=True) if is_taken]
                            thresholds += [(min(taken), sum(are_valid))] if taken else []
                            expected += top
                        assert mask[..., head].flatten().tolist() == expected, (case, name, rank, head)
                        assert weight[head] == sum(count for _, count in thresholds)
                        if thresholds:
                            mean = sum(value * count for value, count in thresholds) / weight[head].item()
                            assert threshold[head].item() == pytest.approx(mean, rel=1e-6)


def cut(pairs: list[tuple[float, bool]], cuts: list[int], k_percent: float) -> None:
    """Each of four ranks has what lies between two cuts."""
    bounds = [0, *sorted(min(cut, len(pairs)) for cut in cuts), len(pairs)]
    rank, num_tokens = dist.get_rank(), max(1, len(pairs))
    mine = pairs[bounds[rank] : bounds[rank + 1]]
    excess, valid = torch.zeros(1, 1, num_tokens, 1), torch.zeros(1, 1, num_tokens, 1, dtype=torch.bool)
    excess[0, 0, : len(mine), 0] = torch.tensor([value for value, _ in mine])
    valid[0, 0, : len(mine), 0] = torch.tensor([is_valid for _, is_valid in mine], dtype=torch.bool)
    values, are_valid = [value for value, _ in pairs], [is_valid for _, is_valid in pairs]
    count = num_selected(k_percent, sum(are_valid))
    expected = top_by_sorting(values, are_valid, count)
    smallest = min((value for value, taken in zip(values, expected, strict=True) if taken), default=math.nan)
    for name in EXCHANGES:
        (found,) = select_shared(excess, valid, [[sum(are_valid)]], [count], name, dist.group.WORLD)
        assert found.selected_BTK[0, : len(mine), 0].tolist() == expected[bounds[rank] : bounds[rank + 1]]
        assert found.selected_BTK.sum() == sum(expected[bounds[rank] : bounds[rank + 1]])
        assert bits(found.threshold_K.item()) == bits(smallest) or not count


def cut_all(examples: list[tuple[list[tuple[float, bool]], list[int], float]]) -> None:
    for example in examples:
        cut(*example)


def test_ranks_may_be_cut_anywhere() -> None:
    examples = []

    @given(
        st.lists(st.tuples(st.sampled_from([0.0, -0.0, 1.0]) | FLOATS, st.booleans()), max_size=40),
        st.lists(st.integers(0, 40), min_size=3, max_size=3),
        st.floats(0.01, 1),
    )
    @settings(derandomize=True, database=None, max_examples=100)
    def draw(pairs: list[tuple[float, bool]], cuts: list[int], k_percent: float) -> None:
        examples.append((pairs, cuts, k_percent))

    draw()
    assert len(examples) >= 100
    run_ranks(cut_all, 4, examples)


def collectives_of_one_selection(name: str, num_valid: int, micro_steps: int) -> tuple[list[Collective], bool]:
    """What one selection calls, on ranks of which the first has `num_valid` valid pairs; with a bad one on the last."""
    rank = dist.get_rank()
    valid = (torch.arange(40) < (num_valid if rank == 0 else 40)).view(1, 1, 40, 1).expand(micro_steps, 1, 40, HEADS)
    excess = torch.randn(micro_steps, 1, 40, HEADS, generator=torch.Generator().manual_seed(rank))
    if rank == dist.get_world_size() - 1:
        excess[0, 0, 3, 1] = math.nan
    num_valid_MK = [[40 + num_valid] * HEADS] * micro_steps
    with CollectiveRecorder() as recorder:
        selections = select_shared(excess, valid, num_valid_MK, [20] * HEADS, name, dist.group.WORLD)
    return recorder.collectives, any(bool(selection.finite) for selection in selections)


def all_collectives() -> list[tuple[list[Collective], bool]]:
    return [
        collectives_of_one_selection(name, num_valid, micro_steps)
        for name in EXCHANGES
        for micro_steps in (1, 3)
        for num_valid in (40, 0)
    ]


def test_every_rank_runs_the_same_collectives_whatever_its_data_and_sees_a_bad_number() -> None:
    histograms = [Collective("all_reduce", 4 * HEADS * size) for size in (2048, 2048, 1024)]
    expected = [([Collective("all_gather", 4 * HEADS * 40 * micro_steps)], False) for micro_steps in (1, 1, 3, 3)]
    for micro_steps in (1, 1, 3, 3):
        ties = Collective("all_reduce", 4 * HEADS * 2 * micro_steps)
        expected.append(([*histograms, ties], False))
    assert run_ranks(all_collectives, 2) == [expected, expected]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["all_gather", "radix", "rank", "row"])
def test_a_number_that_is_not_finite_is_seen_and_never_selected_before_one_that_is(name: str, value: float) -> None:
    excess, valid = torch.arange(12.0).view(1, 2, 6, 1), torch.ones(1, 2, 6, 1, dtype=torch.bool)
    excess[0, 1, 2, 0] = value

    def select() -> Selection:
        if name in LOCAL:
            return select_local(excess[0], valid[0], 0.5, name)
        return select_shared(excess, valid, [[int(valid.sum())]], [6], name, None)[0]

    found = select()
    assert not found.finite
    assert not found.selected_BTK[1, 2, 0]
    assert found.selected_BTK.sum() == 6
    valid[0, 1, 2, 0] = False
    assert select().finite, "outside the pool it is nobody's business"


@pytest.mark.parametrize("select", [select_by_gathering, select_by_radix])
def test_no_exchange_looks_at_a_value_on_the_host(select: exchange.Exchange) -> None:
    """Tensors that have shapes and no values refuse whatever would wait for one: `item`, `nonzero`, indexing by a mask."""
    keys = torch.empty(2, 3, 40, HEADS, dtype=torch.int32, device="meta")
    selected, threshold, finite = select(keys, [7, 0, 30], None)
    assert (selected.shape, threshold.shape, finite.shape) == (keys.shape, (HEADS,), ())
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(finite)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["all_gather", "radix"])
def test_no_exchange_waits_for_the_device(name: str) -> None:
    excess, valid = pool_of(CASES[0], 1)
    counts = counts_of(CASES[0], valid)
    pool = (excess[:, 0].cuda(), valid[:, 0].cuda(), valid.sum((1, 2, 3)).tolist(), counts, name, None)
    expected = select_shared(excess[:, 0], valid[:, 0], *pool[2:])[0]
    with waiting_for_cuda_raises():
        (found,) = select_shared(*pool)
    assert torch.equal(found.selected_BTK.cpu(), expected.selected_BTK)
    # Bits, since a head without pairs has no threshold.
    assert torch.equal(found.threshold_K.cpu().view(torch.int32), expected.threshold_K.view(torch.int32))


def test_counts_of_a_pool_have_room() -> None:
    assert exchange.histogram_dtype(2**31 - 1) is torch.int32
    assert exchange.histogram_dtype(2**31) is torch.int64


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
    policy, reference = torch.tensor([1.0, math.nan]), torch.tensor([-1.0, 0.5])
    drawn = torch.tensor([0.1, 0.2])
    assert score("policy_loss", policy, None, None)[0] == 1.0
    assert score("excess", policy, reference, None)[0] == 2.0
    assert score("random", policy, None, drawn)[0] == pytest.approx(0.1)
    for name in ("policy_loss", "excess", "random"):
        assert score(name, policy, reference, drawn)[1].isnan()
