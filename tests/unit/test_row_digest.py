"""The digest of a step's samples: the same on any number of ranks, another for any other sample or order, and computed again
from the record of the order alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.consumption import Consumed, count
from pipeline.data.loading.mixture import DataSet
from pipeline.data.loading.order_record import order_of_record, record_of_order, sample_numbers
from pipeline.data.loading.row_digest import joined, parts, sample_digest
from pipeline.data.loading.stream import Stream
from tests.data_sets import numbered_data

G, STEPS = 8, 9


@given(numbers=st.lists(st.integers(-1, 2**40), min_size=2, max_size=20), first=st.integers(0, 2**50), data=st.data())
def test_a_digest_is_a_sum_over_parts_and_tells_samples_and_their_order(
    numbers: list[int], first: int, data: st.DataObject
) -> None:
    samples, rows = np.array(numbers), first + np.arange(len(numbers))
    whole = sample_digest(rows, samples)
    assert 0 <= whole < 2**64

    cut = data.draw(st.integers(0, len(numbers)))
    of_ranks = [parts(sample_digest(rows[part], samples[part])) for part in (slice(cut), slice(cut, None))]
    assert joined(*map(sum, zip(*of_ranks, strict=True))) == whole

    one, other = data.draw(st.permutations(range(len(numbers))))[:2]
    swapped = samples.copy()
    swapped[[one, other]] = samples[[other, one]]
    assert (sample_digest(rows, swapped) == whole) == (samples[one] == samples[other])
    changed = samples.copy()
    changed[one] += 1
    assert sample_digest(rows, changed) != whole


def stream(sets: list[DataSet], ranks: int, workers: int = 0) -> Stream:
    sizes = {"lanes": 4, "global_batch": G, "micro_batch": 4 // ranks, "seed": 7, "shuffle_block": 8, "num_workers": workers}
    return Stream(sets, rank=0, world_size=ranks, **sizes)  # type: ignore[arg-type]


def digests(first: Stream) -> list[int]:
    """Of each step, as training has them: summed over ranks."""
    sums = np.zeros((STEPS, 10), np.int64)
    for rank in range(first.world_size):
        own = first.of_rank(rank)
        batches = own.iterate(0, end_sample=STEPS * G)
        for micro_step, batch in enumerate(batches):
            first_row = micro_step * G // own.micro_steps + rank * own.micro_batch
            sums[micro_step // own.micro_steps] += count([batch], 2, [first_row]).numpy()
    return [Consumed.of(of_step.tolist()).digest for of_step in sums]


@pytest.mark.parametrize("names", [("",), ("prose", "code", "web")], ids=["one set", "a mixture"])
def test_digests_of_training_are_those_of_the_recorded_order_on_any_ranks(tmp_path: Path, names: tuple[str, ...]) -> None:
    sets = [DataSet(numbered_data(tmp_path / f"set {name}", 13 + 9 * at), 1 + at, name) for at, name in enumerate(names)]
    streams = [stream(sets, 1), stream(sets, 2), stream(sets, 4), stream(sets, 1, workers=2)]
    found = [digests(each) for each in streams]
    assert all(each == found[0] for each in found)
    assert len(set(found[0])) == STEPS

    record = json.loads(json.dumps(record_of_order(streams[0].order, sets, G)))
    assert record["sets"][0]["shards"] == [[11, 1], [2, 1]]
    numbers = sample_numbers(order_of_record(record), 0, STEPS * G // 4)
    assert [sample_digest(G * step + np.arange(G), numbers[G * step :][:G]) for step in range(STEPS)] == found[0]
