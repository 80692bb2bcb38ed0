"""The stream: which rank sees which row when, for any number of ranks and loader workers (I7, I8)."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipeline.data.errors import DataError
from pipeline.data.loading.sizes import divisors
from pipeline.data.loading.stream import Stream, check_sizes, rank_lanes
from pipeline.data.shards.manifest import Manifest, Source, write_manifest
from pipeline.data.shards.writer import Row, write_shards

T = 4
SIZES = {
    "lanes": 12,
    "global_batch": 24,
    "micro_batch": 2,
    "rank": 0,
    "world_size": 1,
    "seed": 3,
    "shuffle_block": 8,
}

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def data_set(directory, num_samples, samples_per_shard=11):
    """Row n has the tokens 10n … 10n + 3."""
    directory.mkdir(exist_ok=True)
    rows = [
        Row(10 * n + np.arange(T, dtype=np.uint32), np.array([3], np.uint32), np.array([n % 2], np.uint8))
        for n in range(num_samples)
    ]
    shards = write_shards(rows, directory, vocab_size=10_000, samples_per_shard=samples_per_shard, named_sources=True)
    manifest = Manifest(
        sequence_length=T,
        vocab_size=10_000,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        sources=(Source(name="even", documents=1, tokens=3), Source(name="odd", documents=1, tokens=3)),
        shards=tuple(shards),
    )
    write_manifest(directory, manifest)
    (directory / manifest.tokenizer_file).touch()
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("stream") / "data", 50)


def stream(folder, **changes):
    return Stream(folder, **{**SIZES, **changes})


def numbers(batch):
    assert (batch.tokens_BT == batch.tokens_BT[:, :1] + torch.arange(T)).all()
    return (batch.tokens_BT[:, 0] // 10).tolist()


def take(folder, num_steps, start_sample=0, **sizes):
    """What each rank gets: [rank][micro-step], lists of the numbers of rows."""
    world_size = sizes["world_size"]
    ranks = []
    for rank in range(world_size):
        reader = stream(folder, rank=rank, **sizes)
        batches = reader.iterate(start_sample)
        ranks.append([numbers(batch) for batch in itertools.islice(batches, num_steps * reader.micro_steps)])
    return ranks


def job_rows(ranks):
    """The job's rows in the design's order: micro-step by micro-step, rank by rank."""
    return [row for micro_step in zip(*ranks, strict=True) for rows in micro_step for row in rows]


def expected_rows(folder, start, end, **sizes):
    reader = stream(folder, **sizes)
    first_of_shard = np.cumsum([0, *(shard.samples for shard in reader.manifest.shards)])
    located = (reader.order.orders[0].locate_row(row) for row in range(start, end))
    return [int(first_of_shard[shard]) + sample for _, shard, sample in located]


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 1), (1, 12), (1, 4), (2, 2), (2, 6), (3, 2), (4, 1), (4, 3), (6, 2), (12, 1)]
)
def test_steps_hold_the_same_rows_in_the_same_order_on_any_number_of_ranks(folder, world_size, micro_batch):
    ranks = take(folder, num_steps=5, world_size=world_size, micro_batch=micro_batch)
    assert job_rows(ranks) == expected_rows(folder, 0, 5 * 24)


@pytest.mark.parametrize(("lanes", "global_batch"), [(1, 1), (5, 5), (6, 30), (24, 24), (50, 50)])
def test_other_sizes_do_so_too(folder, lanes, global_batch):
    ranks = take(folder, num_steps=3, world_size=1, micro_batch=1, lanes=lanes, global_batch=global_batch)
    expected = expected_rows(folder, 0, 3 * global_batch, lanes=lanes, global_batch=global_batch, micro_batch=1)
    assert job_rows(ranks) == expected


def test_micro_steps_hold_the_same_rows_where_ranks_times_micro_batch_is_the_same(folder):
    def micro_steps(world_size, micro_batch):
        ranks = take(folder, num_steps=3, world_size=world_size, micro_batch=micro_batch)
        return [list(itertools.chain(*rows)) for rows in zip(*ranks, strict=True)]

    assert micro_steps(1, 6) == micro_steps(2, 3) == micro_steps(3, 2) == micro_steps(6, 1)


def test_an_epoch_sees_every_sample_once_but_for_the_remainder(folder):
    reader = stream(folder)
    assert (reader.samples_per_epoch, reader.dropped_per_epoch) == (48, 2)
    rows = job_rows(take(folder, num_steps=4, world_size=3))
    epochs = [rows[:48], rows[48:96]]
    for epoch in epochs:
        assert len(set(epoch)) == 48
        assert set(epoch) <= set(range(50))
    assert epochs[0] != epochs[1]


def test_a_step_may_straddle_two_epochs(folder):
    rows = job_rows(take(folder, num_steps=3, world_size=1, global_batch=36))
    assert len(set(rows[:48])) == 48
    assert len(set(rows[48:96])) == 48
    assert rows == expected_rows(folder, 0, 108)


@pytest.mark.parametrize("start_step", [1, 2, 5, 1000])
def test_resuming_on_other_ranks_goes_on_with_the_same_rows(folder, start_step):
    rows = job_rows(take(folder, num_steps=2, start_sample=start_step * 24, world_size=6, micro_batch=1))
    assert rows == expected_rows(folder, start_step * 24, start_step * 24 + 48)
    if start_step <= 5:
        whole = job_rows(take(folder, num_steps=start_step + 2, world_size=2))
        assert whole[start_step * 24 :] == rows


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 1), (2, 2), (1, 5)])
def test_loader_workers_change_nothing(folder, world_size, num_workers):
    without = take(folder, num_steps=5, start_sample=24, world_size=world_size)
    assert take(folder, num_steps=5, start_sample=24, world_size=world_size, num_workers=num_workers) == without


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_end_stops_after_exactly_those_rows(folder, num_workers):
    for end in (0, 2, 12, 14, 48):
        batches = list(stream(folder, num_workers=num_workers).iterate(0, end_sample=end))
        assert [row for batch in batches for row in numbers(batch)] == expected_rows(folder, 0, end)


def test_batches_carry_documents_sources_and_keys(folder):
    batch = next(stream(folder).iterate())
    rows = numbers(batch)
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, -1]] * 2
    assert batch.sources_BT.tolist() == [[row % 2] * 3 + [0] for row in rows]
    assert batch.keys == tuple(f"shard-{row // 11:05d}/{row:09d}" for row in rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_leaves_the_random_state_of_the_job_alone(folder, num_workers):
    state = torch.get_rng_state()
    next(stream(folder, num_workers=num_workers).iterate())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_reaches_the_job_as_a_data_error_with_its_message(tmp_path, num_workers):
    folder = data_set(tmp_path / "data", 50)
    path = folder / "shard-00003.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 16
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"^shard shard-00003, sample \d+, .* its CRC-32 is") as raised:
        list(stream(folder, num_workers=num_workers, lanes=2, global_batch=2, micro_batch=1).iterate(0, end_sample=50))
    assert "Traceback" not in str(raised.value)
    # Not left to the garbage collector, which would take five seconds a worker.
    assert multiprocessing.active_children() == []


def test_positions_that_are_none_are_refused(folder):
    for start in (-24, 5, 12):
        with pytest.raises(ValueError, match="multiple of 24"):
            stream(folder).iterate(start)
    for end in (1, -2):
        with pytest.raises(ValueError, match="end_sample"):
            stream(folder).iterate(0, end_sample=end)


def test_ranks_share_the_lanes_out_among_them():
    assert rank_lanes(12, 2, 0, 3) == [0, 1, 6, 7]
    assert rank_lanes(12, 2, 2, 3) == [4, 5, 10, 11]


def test_divisors_are_those_of_trial_division():
    for number in range(1, 200):
        assert divisors(number) == [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def test_sizes_of_any_magnitude_are_checked_at_once():
    """A number with two digits too many ended no check: all smaller ones were tried as divisors."""
    (problem,) = check_sizes(lanes=24 * 10**9, global_batch=24 * 10**9, micro_batch=None, world_size=7)
    assert "for 7 ranks write data.global_batch=" in problem


def test_sizes_that_fit_have_no_problems():
    assert check_sizes(lanes=256, global_batch=1024, micro_batch=4, world_size=8, num_workers=32, num_samples=256) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lanes": 20}, ["data.global_batch = 64 is not a multiple of data.lanes = 20", "lanes that fit: 1, 2, 4, 8, 16"]),
        ({"micro_batch": 3}, ["2 × 3", "with 2 ranks, micro-batches that fit: 1, 2, 4, 8, 16"]),
        (
            {"world_size": 3},
            [
                "3 × 2",
                "write data.global_batch=66 data.lanes=6; with micro-batches of 2, numbers of ranks that fit: 1, 2, 4, 8, 16",
            ],
        ),
        ({"num_workers": 17}, ["expected at most 16"]),
        ({"num_samples": 31}, ["31 samples, fewer than data.lanes = 32"]),
        ({"micro_batch": 0, "lanes": -1}, ["data.lanes = -1: expected", "data.micro_batch = 0: expected"]),
        ({"num_workers": -1}, ["data.num_workers = -1"]),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_those_that_would(changes, expected):
    sizes = {"lanes": 32, "global_batch": 64, "micro_batch": 2, "world_size": 2, "num_workers": 2, "num_samples": 100}
    message = "\n".join(check_sizes(**{**sizes, **changes}))
    for part in expected:
        assert part in message
    # A way that leads nowhere is not offered.
    assert "none" not in message


def test_all_problems_are_told_at_once_and_lists_have_a_bound():
    problems = check_sizes(lanes=5040, global_batch=5041, micro_batch=11, world_size=1, num_samples=7)
    assert len(problems) == 3
    assert all(len(problem) < 400 for problem in problems)


def test_a_stream_of_sizes_that_do_not_fit_is_an_error(folder):
    with pytest.raises(DataError, match=r"50 samples, fewer than data.lanes = 64"):
        stream(folder, lanes=64, global_batch=64)


START_AGAIN_AND_AGAIN = """
import itertools, signal, sys
from pathlib import Path
from pipeline.data.loading.sizes import divisors
from pipeline.data.loading.stream import Stream

signal.signal(signal.SIGTERM, lambda *_: None)
sizes = dict(lanes=12, global_batch=24, micro_batch=2, rank=0, world_size=1, seed=3, shuffle_block=8, num_workers=3)
for _ in range(8):
    batches = Stream(Path(sys.argv[1]), **sizes).iterate()
    print("starting", flush=True)
    print(sum(len(batch.keys) for batch in itertools.islice(batches, 24)), flush=True)
    batches.close()
"""


def test_a_signal_to_all_processes_while_workers_start_ends_none_of_them(folder):
    """What a scheduler does that stops a job just as it begins."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", START_AGAIN_AND_AGAIN, str(folder)], **piped) as process:
        rows = []
        for line in process.stdout:
            if line == "starting\n":
                time.sleep(0.012 * len(rows))
                os.killpg(process.pid, signal.SIGTERM)
            else:
                rows.append(line)
    assert rows == ["48\n"] * 8
