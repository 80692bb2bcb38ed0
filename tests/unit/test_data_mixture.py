"""Mixtures: which set comes when, exactly and without memory; each set with its own epochs; sources that stay apart."""

import itertools
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import DataSet, Schedule
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.manifest import read_manifest, write_manifest
from tests.data_sets import numbered_data

weights = st.lists(st.integers(1, 1000).map(lambda number: number / 100), min_size=1, max_size=6)


# One, and the reciprocals of Fibonacci's numbers, as many as the tree may have levels below its root.
LANE_BOUNDS = {1: 1, 2: 1, 3: 2, 4: Fraction(5, 2), 5: Fraction(17, 6), 6: Fraction(91, 30)}


@settings(max_examples=25)
@given(weights=weights, lanes=st.integers(1, 40), lane=st.integers(0, 39))
def test_counts_are_those_of_choosing_one_by_one_and_prefixes_are_off_by_less_than_a_constant(weights, lanes, lane):
    schedule, taken = Schedule(weights, lanes), [0] * len(weights)
    lane %= lanes
    shares = [Fraction(str(weight)) / sum(Fraction(str(each)) for each in weights) for weight in weights]
    for number in range(60):
        assert schedule.counts(lane, number) == taken
        off = max(abs(count - share * number) for count, share in zip(taken, shares, strict=True))
        assert off < LANE_BOUNDS[len(weights)]
        chosen, before = schedule.choose(lane, number)
        assert before == taken[chosen]
        taken[chosen] += 1


def test_a_long_run_is_exact_and_costs_nothing_to_find():
    schedule = Schedule([0.7, 0.2, 0.1], 256)
    assert schedule.counts(17, 10**15) == [7 * 10**14, 2 * 10**14, 10**14]
    assert schedule.choose(17, 10**15)[1] in schedule.counts(17, 10**15)


def test_a_set_of_more_than_half_is_never_off_by_a_whole_sample():
    for order in itertools.permutations([0.9, 0.04, 0.03, 0.02, 0.01]):
        schedule, heavy = Schedule(order, 16), order.index(0.9)
        assert all(abs(schedule.counts(5, number)[heavy] - Fraction(9, 10) * number) < 1 for number in range(200))


@pytest.mark.parametrize(("num_sets", "most"), [(2, 1), (3, 8), (4, 16), (5, 24)])
def test_the_whole_job_is_off_by_a_few_samples_after_any_round_however_many_there_were(num_sets, most):
    draw, farthest = np.random.default_rng(num_sets), Fraction(0)
    for _ in range(12):
        schedule = Schedule((draw.integers(1, 1000, num_sets) / 100).tolist(), 256)
        for number in (*draw.integers(1, 5000, 3).tolist(), int(draw.integers(10**9, 10**12))):
            by_lane = [schedule.counts(lane, number) for lane in range(256)]
            for own, share, counts in zip(range(num_sets), schedule.shares, zip(*by_lane, strict=True), strict=True):
                assert max(abs(count - share * number) for count in counts) < LANE_BOUNDS[num_sets], own
                farthest = max(farthest, abs(sum(counts) - 256 * share * number))
    assert farthest < most


def test_a_round_of_the_lanes_is_a_mixture_too():
    for chosen_weights, allowed in (([0.7, 0.3], 1), ([5, 3, 1, 1], 8)):
        schedule = Schedule(chosen_weights, 64)
        for number in range(200):
            together = np.sum([schedule.counts(lane, number) for lane in range(64)], axis=0)
            expected = 64 * number * np.array(chosen_weights) / sum(chosen_weights)
            assert abs(together - expected).max() < allowed
            in_round = Counter(schedule.choose(lane, number)[0] for lane in range(64))
            assert in_round[0] == pytest.approx(64 * chosen_weights[0] / sum(chosen_weights), abs=allowed)


def test_the_schedule_is_pinned_for_good():
    # If this fails, runs that are under way would see other samples after an update.
    schedule = Schedule([0.5, 0.3, 0.2], 4)
    assert ["".join(str(schedule.choose(lane, n)[0]) for n in range(20)) for lane in range(4)] == [
        "10102010201010201020",
        "01020101020102010102",
        "01020102010102010201",
        "20101020102010102010",
    ]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return [
        DataSet(numbered_data(folder / "a", 40, first=0), 0.6, "prose"),
        DataSet(numbered_data(folder / "b", 31, first=1000, sources=()), 0.3, "code"),
        DataSet(numbered_data(folder / "c", 23, first=2000, sources=("odd", "rest")), 0.1, "web"),
    ]


def stream(sets, **changes):
    sizes = {"lanes": 6, "global_batch": 12, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 5, "shuffle_block": 8}
    return Stream(sets, **sizes | changes)


def rows_of(batches):
    return [row // 10 for batch in batches for row in batch.tokens_BT[:, 0].tolist()]


def test_every_epoch_of_every_set_has_each_sample_once(sets):
    mixed = stream(sets)
    rows = rows_of(mixed.iterate(0, end_sample=6 * 300))
    for number, order in enumerate(mixed.order.orders):
        for lane in range(6):
            own = [row for row in rows[lane::6] if row // 1000 == number]
            per_lane = order.samples_per_lane
            epochs = [own[start : start + per_lane] for start in range(0, len(own) - per_lane + 1, per_lane)]
            assert len(epochs) > 3
            for epoch, seen in enumerate(epochs):
                first = lane * per_lane
                where = [order.locate(epoch, first + within) for within in range(per_lane)]
                firsts = np.cumsum([0, *(shard.samples for shard in mixed.manifests[number].shards)])
                assert seen == [1000 * number + int(firsts[shard]) + sample for shard, sample in where]
    assert mixed.order.consumed(6 * 300) == [sum(row // 1000 == number for row in rows) for number in range(3)]
    assert mixed.order.consumed(8) == [sum(row // 1000 == number for row in rows[:8]) for number in range(3)]


@pytest.mark.parametrize(("world_size", "micro_batch", "num_workers"), [(1, 6, 0), (3, 1, 0), (3, 2, 0), (1, 2, 2)])
def test_any_ranks_and_workers_give_the_same_rows_and_resuming_goes_on_with_them(sets, world_size, micro_batch, num_workers):
    whole = rows_of(stream(sets).iterate(0, end_sample=96))
    sizes = {"world_size": world_size, "micro_batch": micro_batch, "num_workers": num_workers}
    ranks = [list(stream(sets, rank=rank, **sizes).iterate(36, end_sample=96)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert rows_of(itertools.chain(*zip(*ranks, strict=True))) == whole[36:]


def test_sources_are_joined_by_name_and_unnamed_ones_are_called_after_their_set(sets):
    mixed = stream(sets)
    assert mixed.manifest.source_names == ("even", "odd", "code", "rest")
    for batch in mixed.iterate(0, end_sample=240):
        for tokens, sources, key in zip(batch.tokens_BT.tolist(), batch.sources_BT.tolist(), batch.keys, strict=True):
            number, row = divmod(tokens[0] // 10, 1000)
            name, names = [("prose", ["even", "odd"]), ("code", ["code"] * 2), ("web", ["odd", "rest"])][number]
            assert [mixed.manifest.source_names[source] for source in sources[:3]] == [names[row % 2]] * 3
            assert key.startswith(f"{name}:shard-0000")


def test_one_set_is_the_order_of_its_folder_alone(sets):
    alone = Stream(sets[0].location, lanes=6, global_batch=12, micro_batch=2, rank=0, world_size=1, seed=5, shuffle_block=8)
    assert rows_of(stream(sets[:1]).iterate(0, end_sample=60)) == rows_of(alone.iterate(0, end_sample=60))


def test_the_bound_on_open_files_is_that_of_all_sets_together(tmp_path):
    many = [DataSet(numbered_data(tmp_path / str(n), 60, samples_per_shard=2), 1, str(n)) for n in range(5)]
    descriptors = Path("/proc/self/fd")
    most = 0
    for _ in stream(many).iterate(0, end_sample=360):
        targets = [os.readlink(path) for path in descriptors.iterdir() if path.is_symlink()]
        most = max(most, sum(target.startswith(str(tmp_path)) for target in targets))
    assert 3 * 5 < most <= 3 * 64


def test_sets_that_do_not_go_together_are_refused(sets, tmp_path):
    longer = DataSet(numbered_data(tmp_path / "longer", 20, sequence_length=5), 1, "longer")
    with pytest.raises(DataError, match=r"data.mixture: .*longer was prepared with rows of another length .*\(5, 4\)"):
        stream([*sets, longer])
    other = numbered_data(tmp_path / "other", 20)
    write_manifest(other, read_manifest(other).model_copy(update={"tokenizer_sha256": "1" * 64}))
    with pytest.raises(DataError, match="another tokenizer"):
        stream([*sets, DataSet(other, 1, "other")])
    with pytest.raises(DataError, match=r"23 samples, fewer than data.lanes = 24"):
        stream(sets, lanes=24, global_batch=24)
