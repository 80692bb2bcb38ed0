"""What a step's data was, over all ranks, and what all ranks do about damage in it: the same."""

import types

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.consumption import Consumed, count, data_metrics, handle_damage
from pipeline.data.errors import DataError
from pipeline.data.loading.batch import blank_batch, collate
from pipeline.data.loading.mixture import DataSet
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.sample import Sample
from pipeline.data_settings import DataSettings
from pipeline.runtime.tensorboard import place_of
from tests.data_sets import numbered_data
from tests.ranks import run_ranks

T = 8


def sample(documents, damage=None):
    """`documents` are (length, source) pairs."""
    lengths, sources = np.array(documents or np.zeros((0, 2)), np.int64).T
    return Sample("shard/key", np.arange(T, dtype=np.uint16), lengths.astype(np.uint32), sources.astype(np.uint8), damage)


def counted(batches, num_sources):
    return count(batches, num_sources, [0] * len(batches))


rows = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=2)


@settings(max_examples=40)
@given(batches=st.lists(st.lists(rows, min_size=1, max_size=3), min_size=1, max_size=3))
def test_counts_are_those_of_counting_by_hand(batches):
    consumed = Consumed.of(counted([collate([sample(row) for row in rows]) for rows in batches], 3).tolist())
    tokens, samples = [0] * 3, [0] * 3
    for documents in (row for rows in batches for row in rows):
        for length, source in documents:
            tokens[source] += length
        for source in {source for _, source in documents}:
            samples[source] += 1
    assert (consumed.tokens, consumed.tokens_by_source, consumed.samples_by_source) == (sum(tokens), tokens, samples)
    assert consumed.positions == T * sum(map(len, batches))
    assert (consumed.damaged, consumed.failed) == (0, 0)


def settled(batches, before=0, **changes):
    return handle_damage(Consumed.of(counted(batches, 1).tolist()), batches, DataSettings(**changes), before)


def test_damage_is_an_error_or_passed_over_up_to_a_cap():
    whole, damaged = collate([sample([(3, 0)])]), collate([sample([], "shard a is bad"), sample([], "shard b is bad")])
    assert settled([whole]) == []
    with pytest.raises(DataError, match=r"^shard a is bad \(1 more in this step\); or train with data.on_corrupt=skip, "):
        settled([whole, damaged])
    assert settled([whole, damaged], on_corrupt="skip", max_corrupt=2) == ["shard a is bad", "shard b is bad"]
    for before, cap in ((0, 1), (9, 10)):
        with pytest.raises(DataError, match=rf"^{before + 2} damaged samples, more than data.max_corrupt = {cap}; .*shard b"):
            settled([whole, damaged], before, on_corrupt="skip", max_corrupt=cap)


def test_data_that_cannot_be_reached_is_an_error_whatever_is_set():
    with pytest.raises(DataError, match=r"^no route$") as raised:
        settled([blank_batch(2, T, "no route")], on_corrupt="skip")
    assert raised.value.agreed


REMEDY = "; or train with data.on_corrupt=skip, which puts a row of padding in its place"
CASES = {
    ("error", None): (f"shard x, sample 7{REMEDY}", True),
    ("skip", None): ["shard x, sample 7"],
    ("skip", "not read in 5 s"): ("not read in 5 s", True),
}


def settle_on_this_rank():
    """Rank 1 alone has met damage, or has no data."""
    answers = []
    for on_corrupt, failure in CASES:
        batches = [collate([sample([(3, 0)])])]
        if dist.get_rank() == 1:
            batches = [blank_batch(1, T, failure) if failure else collate([sample([], "shard x, sample 7")])]
        counts = counted(batches, 1)
        dist.all_reduce(counts)
        try:
            answers.append(handle_damage(Consumed.of(counts.tolist()), batches, DataSettings(on_corrupt=on_corrupt), 0))
        except DataError as error:
            answers.append((str(error), error.agreed))
    return answers


def test_all_ranks_do_the_same_about_what_one_of_them_met():
    assert run_ranks(settle_on_this_rank, 2) == [list(CASES.values())] * 2


def test_curves_have_regular_names_and_follow_each_set_and_source(tmp_path):
    sets = [
        DataSet(numbered_data(tmp_path / "a", 40), 3, "prose"),
        DataSet(numbered_data(tmp_path / "b", 20, sources=()), 1, "code"),
    ]
    sizes = {"lanes": 4, "global_batch": 8, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 0, "shuffle_block": 8}
    stream = Stream(sets, **sizes)
    progress = types.SimpleNamespace(corrupt_samples=3, tokens_by_source=[10, 20, 30], samples_by_source=[4, 5, 6], skipped=())
    consumed = Consumed(tokens=24, positions=32, damaged=0, failed=0, digest=0, tokens_by_source=[], samples_by_source=[])
    record = data_metrics(stream, 80, progress, consumed)
    assert record == {
        "data_epoch": 80 / 60,
        "data_padding_share": 0.25,
        "corrupt_samples": 3,
        "data_samples_set_prose": 60,
        "data_epoch_set_prose": 1.5,
        "data_samples_set_code": 20,
        "data_epoch_set_code": 1.0,
        "data_tokens_source_even": 10,
        "data_tokens_source_odd": 20,
        "data_tokens_source_code": 30,
        "data_samples_source_even": 4,
        "data_samples_source_odd": 5,
        "data_samples_source_code": 6,
    }
    # Rows 16 to 32 were left out: 12 of the first set, 4 of the second.
    progress.skipped = [(16, 32)]
    counted = {key: value for key, value in data_metrics(stream, 64, progress, consumed).items() if "set_" in key}
    assert counted == {
        "data_samples_set_prose": 48,
        "data_epoch_set_prose": 1.5,
        "data_samples_set_code": 16,
        "data_epoch_set_code": 1.0,
    }
    assert [place_of(key) for key in ("data_epoch", "data_wait", "corrupt_samples")] == [
        ("", "z_data/epoch"),
        ("", "wall_clock/data_wait"),
        ("", "z_data/corrupt_samples"),
    ]
    assert place_of("data_tokens_source_a_head_1") == ("source_a_head_1", "z_data/tokens")
    assert place_of("data_epoch_set_prose") == ("set_prose", "z_data/epoch")
    assert place_of("corrupt_samples", "validation") == ("", "validation/corrupt_samples")
