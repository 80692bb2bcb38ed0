"""Stretches of rows that are left out: against lists of rows, and as every rank and worker reads them."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.loading.mixture import DataSet
from pipeline.data.loading.skipping import Stretch, added_stretch, position_of, with_stretch
from pipeline.data.loading.stream import Stream
from tests.data_sets import numbered_data

MANY = 400
STRETCHES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=6)


@given(STRETCHES)
def test_each_stretch_is_left_out_of_the_rows_that_are_left(stretches: list[tuple[int, int]]) -> None:
    left, skipped = list(range(MANY)), []
    for first, count in stretches:
        before, skipped = skipped, with_stretch(skipped, first, count)
        assert added_stretch(before, skipped) == (first, first + count)
        assert added_stretch(skipped, before) is None
        del left[first : first + count]
    assert [position_of(number, skipped) for number in range(len(left))] == left
    assert sum(end - start for start, end in skipped) == MANY - len(left)
    assert all(one.end < other.start for one, other in itertools.pairwise(skipped)), "apart and in order"


def test_a_stretch_round_an_earlier_one_takes_it_in() -> None:
    once = with_stretch([], 10, 5)
    assert once == [Stretch(10, 15)]
    assert with_stretch(once, 8, 4) == [Stretch(8, 17)]
    assert with_stretch([[10, 15]], 10, 2) == [Stretch(10, 17)], "as a checkpoint has it"
    assert with_stretch(once, 2, 3) == [Stretch(2, 5), Stretch(10, 15)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[DataSet]:
    folder = tmp_path_factory.mktemp("sets")
    return [DataSet(numbered_data(folder / "a", 40), 3, "prose"), DataSet(numbered_data(folder / "b", 24), 1, "code")]


def keys(sets: list[DataSet], ranks: int, workers: int, start: int, skipped: Any = (), num_rows: int = 160) -> list[str]:
    """The keys of the rows from `start` on, in order, as `ranks` ranks read them."""
    streams = [
        Stream(
            sets,
            lanes=4,
            global_batch=8,
            micro_batch=4 // ranks,
            rank=rank,
            world_size=ranks,
            seed=3,
            shuffle_block=8,
            num_workers=workers,
        )
        for rank in range(ranks)
    ]
    read = [stream.iterate(start, end_sample=start + num_rows, skipped=skipped) for stream in streams]
    return [key for batches in zip(*read, strict=True) for batch in batches for key in batch.keys]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 1)])
def test_every_rank_and_worker_leaves_out_the_same_rows(sets: list[DataSet], ranks: int, workers: int) -> None:
    skipped = [[16, 40], [80, 88]]
    every = keys(sets, 1, 0, 0, num_rows=400)
    left = every[:16] + every[40:80] + every[88:]
    assert keys(sets, ranks, workers, 0, skipped) == left[:160]
    # From any position, one within what would have been left out among them.
    for start in (8, 16, 24, 56, 64):
        assert keys(sets, ranks, workers, start, skipped, 80) == left[start : start + 80]
