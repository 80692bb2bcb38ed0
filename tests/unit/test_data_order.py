"""The order of a run's rows: against a naive oracle, and its promises."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.errors import DataError
from pipeline.data.loading.order import EpochOrder, default_lanes
from pipeline.data.permutation import BLOCK, GROUP_MEMBERS, GROUPS, SHARDS, permutation


def naive_permutation(length, *name):
    """SplitMix64 in Python's integers, and a plain sort."""
    mask = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = 0
    for word in name:
        state = mix(((state ^ (word & mask)) + 0x9E3779B97F4A7C15) & mask)
    keys = [mix((state + (index + 1) * 0x9E3779B97F4A7C15) & mask) for index in range(length)]
    return sorted(range(length), key=lambda index: keys[index])


def naive_epoch(shard_samples, seed, epoch, shuffle_block):
    """The whole epoch's (shard, sample) pairs, spelled out."""
    sequence = []
    for shard in naive_permutation(len(shard_samples), SHARDS, seed, epoch):
        for block, start in enumerate(range(0, shard_samples[shard], shuffle_block)):
            length = min(shuffle_block, shard_samples[shard] - start)
            order = naive_permutation(length, BLOCK, seed, epoch, shard, block)
            sequence += [(shard, start + index) for index in order]
    return sequence


def naive_rows(shard_samples, lanes, seed, shuffle_block, num_epochs):
    rows = []
    for epoch in range(num_epochs):
        sequence = naive_epoch(shard_samples, seed, epoch, shuffle_block)
        per_lane = len(sequence) // lanes
        rows += [(epoch, *sequence[lane * per_lane + within]) for within in range(per_lane) for lane in range(lanes)]
    return rows


shards_and_lanes = st.lists(st.integers(1, 13), min_size=1, max_size=6).flatmap(
    lambda shards: st.tuples(st.just(shards), st.integers(1, sum(shards)))
)


@settings(deadline=None)
@given(sizes=shards_and_lanes, seed=st.integers(-5, 2**70), shuffle_block=st.integers(1, 20))
def test_every_row_is_where_the_naive_order_has_it(sizes, seed, shuffle_block):
    shards, lanes = sizes
    order = EpochOrder(shards, lanes=lanes, seed=seed, shuffle_block=shuffle_block)
    expected = naive_rows(shards, lanes, seed, shuffle_block, num_epochs=2)
    assert [order.locate_row(row) for row in range(len(expected))] == expected


@settings(deadline=None)
@given(sizes=shards_and_lanes, shuffle_block=st.integers(1, 20), epoch=st.integers(0, 3))
def test_no_sample_comes_twice_in_an_epoch_and_only_the_remainder_is_left_out(sizes, shuffle_block, epoch):
    shards, lanes = sizes
    order = EpochOrder(shards, lanes=lanes, seed=1, shuffle_block=shuffle_block)
    first = epoch * order.samples_per_epoch
    seen = [order.locate_row(row)[1:] for row in range(first, first + order.samples_per_epoch)]
    assert len(set(seen)) == len(seen)
    every_sample = {(shard, sample) for shard, count in enumerate(shards) for sample in range(count)}
    last_of_the_order = naive_epoch(shards, 1, epoch, shuffle_block)[order.samples_per_epoch :]
    assert every_sample - set(seen) == set(last_of_the_order)
    assert order.dropped_per_epoch == len(last_of_the_order) < lanes


def naive_order_of_many_shards(num_shards, seed, epoch, group=1024):
    """Dealt into groups by the seed; groups permuted, and the shards in each."""
    dealt = naive_permutation(num_shards, GROUP_MEMBERS, seed)
    groups = [dealt[start : start + group] for start in range(0, num_shards, group)]
    order = []
    for number in naive_permutation(len(groups), GROUPS, seed, epoch):
        within = naive_permutation(len(groups[number]), SHARDS, seed, epoch, number)
        order += [groups[number][index] for index in within]
    return order


@pytest.mark.parametrize("epoch", [0, 7])
def test_more_shards_than_are_sorted_at_once_are_permuted_group_by_group(epoch):
    num_shards = 2**15 + 1
    samples = [1 + number % 5 for number in range(num_shards)]
    order = EpochOrder(samples, lanes=3, seed=11, shuffle_block=2)
    expected = naive_order_of_many_shards(num_shards, 11, epoch)
    assert sorted(expected) == list(range(num_shards))
    shards, _ = order.locate_lane(0, epoch * order.samples_per_lane, order.samples_per_lane)
    rest = [order.locate(epoch, position)[0] for position in range(order.samples_per_lane, order.num_samples, 997)]
    sequence = [shard for shard in expected for _ in range(samples[shard])]
    assert shards.tolist() == sequence[: order.samples_per_lane]
    assert rest == sequence[order.samples_per_lane :: 997]
    # Every sample of every shard that lies wholly in the lane, in blocks of two.
    where = [order.locate(epoch, position) for position in range(200)]
    whole = dict.fromkeys(shard for shard, _ in where[: -max(samples)])
    assert [sorted(sample for shard, sample in where if shard == each) for each in whole] == [
        list(range(samples[each])) for each in whole
    ]


def test_up_to_32768_shards_are_one_permutation_by_seed_and_epoch():
    order = EpochOrder([1] * 2**15, lanes=1, seed=4, shuffle_block=1)
    shards, _ = order.locate_lane(0, 2 * 2**15, 2**15)
    assert shards.tolist() == permutation(2**15, SHARDS, 4, 2).tolist()


def test_epochs_of_many_shards_have_nothing_to_do_with_each_other_or_with_the_manifests_order():
    num_shards = 2**16
    order = EpochOrder([1] * num_shards, lanes=1, seed=0, shuffle_block=1)
    first, second = (order.locate_lane(0, epoch * num_shards, num_shards)[0] for epoch in (0, 1))
    for shards in (first, second):
        assert np.array_equal(np.sort(shards), np.arange(num_shards))
        # Neighbours in the manifest, as lie in a part of a merged folder, are far apart.
        assert abs(np.corrcoef(shards, np.arange(num_shards))[0, 1]) < 0.02
        assert abs(np.corrcoef(shards[1:], shards[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert (first == second).mean() < 0.001


@pytest.mark.parametrize(("num_shards", "most"), [(2**15, 2 * 2**20), (2**20, 2**24)])
def test_memory_does_not_grow_with_epochs_or_with_what_was_looked_at(num_shards, most):
    order = EpochOrder(np.ones(num_shards, np.int64), lanes=1, seed=0, shuffle_block=1)
    tracemalloc.start()
    try:
        for number in range(2500):
            order.locate(number // 100, number * 7919 % num_shards)
        assert tracemalloc.get_traced_memory()[0] < most
    finally:
        tracemalloc.stop()


def test_epochs_and_seeds_differ():
    def rows(seed, epoch):
        order = EpochOrder([40, 50], lanes=2, seed=seed, shuffle_block=16)
        return [order.locate(epoch, position) for position in range(90)]

    orders = [rows(0, 0), rows(0, 1), rows(1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]


def test_the_order_is_pinned_for_good():
    # If this fails, runs that are under way would see other samples after an update.
    assert permutation(8, SHARDS, 0, 0).tolist() == [6, 1, 7, 3, 4, 2, 0, 5]
    order = EpochOrder([5, 7], lanes=3, seed=17, shuffle_block=4)
    assert [order.locate_row(row) for row in range(10, 16)] == [
        (0, 1, 0),
        (0, 1, 4),
        (1, 1, 1),
        (1, 1, 5),
        (1, 0, 3),
        (1, 1, 3),
    ]


def test_permutations_are_spread_evenly():
    counts = np.zeros((6, 6), int)
    for name in range(3000):
        counts[np.arange(6), permutation(6, BLOCK, name)] += 1
    assert abs(counts - 500).max() < 110  # five standard deviations


def test_more_lanes_than_samples_is_an_error_that_says_so():
    with pytest.raises(DataError, match=r"3 samples, fewer than data.lanes = 4"):
        EpochOrder([1, 2], lanes=4, seed=0, shuffle_block=8)


@pytest.mark.parametrize(("global_batch", "lanes"), [(1, 1), (8, 8), (256, 256), (512, 256), (1000, 250), (509, 1)])
def test_default_lanes_are_the_largest_divisor_up_to_256(global_batch, lanes):
    assert default_lanes(global_batch) == lanes
