"""Held-out rows: every row once, the same rows and the same order for any sizes of the job, with padding at the end."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.held_out import HeldOutRows, ManifestOrder
from pipeline.data.loading.lane_reader import PADDING
from pipeline.data.loading.mixture import DataSet
from tests.data_sets import numbered_data

ROWS = 87


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """87 numbered rows in shards of 11."""
    return numbered_data(tmp_path_factory.mktemp("held_out") / "data", ROWS)


def batches_of(folder: Path, micro_batch: int, world_size: int, num_rows: int | None = None) -> list[list[Batch]]:
    """The micro-batches of each rank."""
    ranks = [
        HeldOutRows(DataSet(folder), num_rows=num_rows, micro_batch=micro_batch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [list(each.batches()) for each in ranks]


def rows_read(ranks: list[list[Batch]]) -> list[int | None]:
    """The numbers of the rows in the order of the micro-steps and ranks; None for padding."""
    batches = [batch for of_all_ranks in zip(*ranks, strict=True) for batch in of_all_ranks]
    return [
        int(tokens[0]) // 10 if (ids >= 0).any() else None
        for batch in batches
        for tokens, ids in zip(batch.tokens_BT, batch.document_ids_BT, strict=True)
    ]


@pytest.mark.parametrize(("micro_batch", "world_size"), [(1, 1), (4, 1), (87, 1), (100, 1), (2, 3), (5, 4), (3, 29), (64, 2)])
def test_every_row_is_read_once_and_every_rank_has_as_many_micro_batches(
    folder: Path, micro_batch: int, world_size: int
) -> None:
    ranks = batches_of(folder, micro_batch, world_size)
    rows = rows_read(ranks)
    assert rows[:ROWS] == list(range(ROWS))
    assert set(rows[ROWS:]) <= {None}
    assert {len(batches) for batches in ranks} == {-(-ROWS // (micro_batch * world_size))}
    assert {len(batch.keys) for batches in ranks for batch in batches} == {micro_batch}


def test_a_second_validation_reads_the_same_rows_again(folder: Path) -> None:
    rows = HeldOutRows(DataSet(folder), num_rows=50, micro_batch=4, rank=1, world_size=2)
    first, second = ([batch.tokens_BT.tolist() for batch in rows.batches()] for _ in range(2))
    assert first == second


def test_padding_is_no_damage_and_has_no_valid_pairs(folder: Path) -> None:
    ((*_, last),) = batches_of(folder, 50, 1)
    assert last.damage == ()
    assert last.failure is None
    assert last.num_valid(2)[37:].sum() == 0
    assert set(last.keys[37:]) == {"(padding)"}


@pytest.mark.parametrize("num_rows", [1, 2, 43, 86, 87])
def test_a_subset_is_the_same_for_any_sizes_and_spread_over_the_folder(folder: Path, num_rows: int) -> None:
    expected = [number * ROWS // num_rows for number in range(num_rows)]
    for micro_batch, world_size in ((1, 1), (4, 1), (3, 5)):
        rows = rows_read(batches_of(folder, micro_batch, world_size, num_rows))
        assert [row for row in rows if row is not None] == expected


def test_more_rows_than_there_are_is_an_error_with_the_number_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows: 88, .* 87 rows; set at most 87"):
        HeldOutRows(DataSet(folder), num_rows=88, micro_batch=1, rank=0, world_size=1)


def test_a_damaged_row_is_in_its_place_with_a_message(folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "data")
    tar = damaged / sorted(path.name for path in damaged.glob("*.tar"))[2]
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    ranks = batches_of(damaged, 4, 2)
    assert rows_read(ranks)[:ROWS] == [*range(22), None, *range(23, ROWS)]
    (message,) = [message for batches in ranks for batch in batches for message in batch.damage]
    assert "sample 0" in message


def test_rows_that_cannot_be_reached_end_with_the_other_ranks(folder: Path, tmp_path: Path) -> None:
    gone = shutil.copytree(folder, tmp_path / "data")
    rows = HeldOutRows(DataSet(gone), micro_batch=4, rank=0, world_size=2)
    shutil.rmtree(gone)
    batches = list(rows.batches())
    assert len(batches) == rows.num_micro_batches == 11
    assert all(batch.failure or batch.damage for batch in batches)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_the_order_is_the_manifests_whatever_the_windows(shard_samples: list[int], data: st.DataObject) -> None:
    total = sum(shard_samples)
    num_rows, lanes = data.draw(st.integers(1, total)), data.draw(st.integers(1, 9))
    first, num_rounds = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 20))
    every_row = [(shard, sample) for shard, samples in enumerate(shard_samples) for sample in range(samples)]
    order = ManifestOrder(shard_samples, num_rows, lanes)
    for lane in range(lanes):
        located = zip(*(column.tolist() for column in order.locate_lane(lane, first, num_rounds)), strict=True)
        for round_number, (number, shard, sample) in enumerate(located, start=first):
            row = round_number * lanes + lane
            assert (number == PADDING) == (row >= num_rows)
            if number != PADDING:
                assert (shard, sample) == every_row[row * total // num_rows]


def test_the_order_of_a_very_large_folder_does_not_overflow() -> None:
    order = ManifestOrder(np.full(5_000_000, 2000), 10**10, 1)
    _, shards, samples = order.locate_lane(0, 10**10 - 1, 1)
    assert (shards[0], samples[0]) == (4_999_999, 1999)
