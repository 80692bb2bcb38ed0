"""The rows of one rank, as micro-batches, from any position of the run.

The position of the whole job is one integer, samples consumed, and what comes at a position is a pure function of it
(`order`, `mixture`). This module only says who reads what. A *round* is one sample of each of the L lanes; a step of G rows
is G / L rounds, and micro-step a of a step holds its rows [a·R·B, (a+1)·R·B), of which rank r has a·R·B + r·B + [0, B). L is
a multiple of R·B, so each lane is read by one rank for as long as the number of ranks stays.

A rank's lanes are split over its DataLoader workers, which own lanes and not batches: each yields its pieces of the rounds,
the DataLoader hands the pieces out in turn, and put together they are the rank's part of the rounds in the order of its
rows. So the number of workers changes nothing but speed. A worker reads a window of rounds at a time, and hands on a few
rounds at a time; pieces travel as few large numpy arrays through a pipe, and not as tensors through /dev/shm, which
containers keep small.

A sample that is damaged is replaced by a row of padding that says so, and data that cannot be reached by such rows for
ever: where the ranks have to go on together until they agree, the batches carry the bad news; elsewhere it is raised.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.batch import Batch, blank_batch, collate
from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.mixture import DataSet, join, order_of
from pipeline.data.order import default_lanes
from pipeline.data.sample import Sample
from pipeline.data.shard_reader import ShardReader
from pipeline.data.shard_table import ShardTable
from pipeline.data.sizes import check_sizes
from pipeline.storage.files import DIRECT, Access
from pipeline.storage.location import Place, Url

__all__ = ["Stream", "check_sizes", "default_lanes", "rank_lanes"]

# Of a worker's memory: what is read at a time, and what is handed on at a time.
_WINDOW_BYTES = 16 * 2**20
_PIECE_BYTES, _PIECE_ROWS = 2**20, 64


class Stream:
    """One rank's view of a prepared folder, or of several.

    Args:
        data: the prepared folder, or the sets of a mixture.
        lanes: L. global_batch: G, rows a step. micro_batch: B, rows a rank and micro-step.
        rank, world_size: of this process, R.
        seed, shuffle_block: of the order; both are part of what a run is.
        num_workers: DataLoader processes; 0 reads in this process.
        access: how data that is not on this machine is reached.
        raises: whether damage and data out of reach are raised by `iterate`. If not, `Batch.damage` and `Batch.failure` say
            so, and the rows concerned are padding.

    Raises:
        DataError: a folder is not a prepared one, or the sizes do not fit (all problems at once).
    """

    def __init__(
        self,
        data: Place | Sequence[DataSet],
        *,
        lanes: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_block: int,
        num_workers: int = 0,
        access: Access = DIRECT,
        raises: bool = True,
    ) -> None:
        self.sets = [DataSet(data)] if isinstance(data, Path | Url) else list(data)
        self.manifests = [read_manifest(each.place, access) for each in self.sets]
        self.manifest, self.source_maps = join(self.manifests, self.sets)
        problems = check_sizes(
            lanes=lanes,
            global_batch=global_batch,
            micro_batch=micro_batch,
            world_size=world_size,
            num_workers=num_workers,
            num_samples=min(manifest.num_samples for manifest in self.manifests),
        )
        if problems:
            raise DataError("\n".join(problems))
        assert 0 <= rank < world_size
        assert shuffle_block >= 1
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.access = access
        self.raises = raises
        self.order = order_of(self.manifests, self.sets, lanes=lanes, seed=seed, shuffle_block=shuffle_block)

    @property
    def lanes(self) -> int:
        """L."""
        return self.order.lanes

    @property
    def samples_per_epoch(self) -> int:
        """Rows that an epoch of every set uses, over all ranks."""
        return sum(order.samples_per_epoch for order in self.order.orders)

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that an epoch leaves out, fewer than L of each set."""
        return sum(order.dropped_per_epoch for order in self.order.orders)

    @property
    def micro_steps(self) -> int:
        """A: micro-batches of this rank in a step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def iterate(self, start_sample: int = 0, *, end_sample: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of the rows [start_sample, end_sample), in order; without an end, for ever.

        Raises:
            DataError: a sample is damaged, the message names it; or data cannot be reached. Only if `raises`.
            ValueError: `start_sample` is not a multiple of G, or `end_sample` none of R·B.
        """
        micro_step = self.micro_batch * self.world_size
        if start_sample < 0 or start_sample % self.global_batch:
            raise ValueError(f"expected start_sample to be a multiple of {self.global_batch} (G), got {start_sample}")
        if end_sample is None:
            return self._micro_batches(start_sample // self.lanes, None)
        if end_sample < start_sample or end_sample % micro_step:
            raise ValueError(
                f"expected end_sample to be a multiple of {micro_step} (ranks × micro-batch) and at least {start_sample}, "
                f"got {end_sample}"
            )
        num_micro_batches = (end_sample - start_sample) // micro_step
        end_round = -(-end_sample // self.lanes)
        return itertools.islice(self._micro_batches(start_sample // self.lanes, end_round), num_micro_batches)

    def _micro_batches(self, start_round: int, end_round: int | None) -> Iterator[Batch]:
        try:
            for samples in self._rounds(start_round, end_round):
                for start in range(0, len(samples), self.micro_batch):
                    batch = collate(samples[start : start + self.micro_batch])
                    if batch.damage and self.raises:
                        raise DataError(batch.damage[0])
                    yield batch
        except DataError as error:
            if self.raises:
                raise
            while True:
                yield blank_batch(self.micro_batch, self.manifest.sequence_length, str(error))

    def _rounds(self, start_round: int, end_round: int | None) -> Iterator[list[Sample]]:
        """This rank's samples of a few rounds after the other, in the order of the rows."""
        lanes = rank_lanes(self.lanes, self.micro_batch, self.rank, self.world_size)
        dataset = _LaneRounds(self, lanes, start_round, end_round)
        if self.num_workers == 0:
            yield from (_put_together([piece]) for piece in map(_raise_if_error, dataset))
            return
        # The loader draws a seed for its workers; from a generator of its own, lest it move the job's random state.
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            worker_init_fn=_end_only_with_the_rank,
        )
        pieces = map(_raise_if_error, loader)
        try:
            while first := next(pieces, None):
                rest = [next(pieces) for _ in range(self.num_workers - 1)]
                yield _put_together([first, *rest])
        finally:
            # Stops the workers here. Left to the garbage collector, which closes their queues before it asks them to stop,
            # an error would cost five seconds a worker.
            del pieces


def rank_lanes(lanes: int, micro_batch: int, rank: int, world_size: int) -> list[int]:
    """The lanes of a rank, in the order of their rows within a round: L / R of them."""
    micro_step = micro_batch * world_size
    return [lane for start in range(rank * micro_batch, lanes, micro_step) for lane in range(start, start + micro_batch)]


@dataclass(frozen=True)
class _Piece:
    """A worker's samples of a few rounds, round after round, in few arrays: `tokens` [N, T], `keys` and `damage` [N],
    `counts` int64 [N], the documents of each, whose lengths and sources follow one another in `lengths` and `sources`."""

    num_rounds: int
    tokens: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None
    keys: list[str]
    damage: dict[int, str]

    @classmethod
    def of(cls, num_rounds: int, samples: Sequence[Sample]) -> "_Piece":
        return cls(
            num_rounds,
            np.stack([sample.tokens for sample in samples]),
            np.array([len(sample.lengths) for sample in samples]),
            np.concatenate([sample.lengths for sample in samples]),
            None
            if samples[0].sources is None
            else np.concatenate([sample.sources for sample in samples if sample.sources is not None]),
            [sample.key for sample in samples],
            {number: sample.damage for number, sample in enumerate(samples) if sample.damage is not None},
        )

    def samples_by_round(self) -> list[list[Sample]]:
        ends = np.cumsum(self.counts).tolist()
        samples = [
            Sample(
                key,
                self.tokens[number],
                self.lengths[start:end],
                None if self.sources is None else self.sources[start:end],
                self.damage.get(number),
            )
            for number, (key, start, end) in enumerate(zip(self.keys, [0, *ends], ends, strict=False))
        ]
        in_round = len(samples) // self.num_rounds
        return [samples[start : start + in_round] for start in range(0, len(samples), in_round)]


def _put_together(pieces: Sequence[_Piece]) -> list[Sample]:
    """The samples of the workers' pieces of the same rounds, round by round in the order of the workers."""
    by_round = zip(*(piece.samples_by_round() for piece in pieces), strict=True)
    return [sample for parts in by_round for part in parts for sample in part]


class _LaneRounds(IterableDataset):
    """A rank's samples of round after round: in a DataLoader worker those of its contiguous share of the lanes.

    What is passed to the workers holds no open file.
    """

    def __init__(self, stream: Stream, lanes: Sequence[int], start_round: int, end_round: int | None) -> None:
        self.sets = stream.sets
        self.manifests = stream.manifests
        self.source_maps = stream.source_maps
        self.access = stream.access
        self.order = stream.order
        self.lanes = lanes
        self.start_round = start_round
        self.end_round = end_round
        row_bytes = max(1, int(ShardTable.of(stream.manifest.shards).sizes.sum()) // stream.manifest.num_samples)
        self.piece_rounds = max(1, min(_PIECE_ROWS, _PIECE_BYTES // row_bytes) // len(lanes))
        self.window_rounds = max(1, _WINDOW_BYTES // row_bytes // len(lanes))

    def __iter__(self) -> Iterator[_Piece | DataError]:
        # An error goes out as a value: raised here, the DataLoader would bury its message in a traceback.
        readers = [
            ShardReader(each.place, manifest, self.access) for each, manifest in zip(self.sets, self.manifests, strict=True)
        ]
        lanes = _worker_share(self.lanes)
        try:
            for num_rounds, samples in self._windows(readers, lanes):
                for first in range(0, num_rounds, self.piece_rounds):
                    in_piece = min(self.piece_rounds, num_rounds - first)
                    yield _Piece.of(in_piece, samples[first * len(lanes) : (first + in_piece) * len(lanes)])
        except DataError as error:
            yield error
        finally:
            for reader in readers:
                reader.close()

    def _windows(self, readers: Sequence[ShardReader], lanes: Sequence[int]) -> Iterator[tuple[int, list[Sample]]]:
        """Window after window: its number of rounds, and its samples round by round. While one is handed on the next one is
        fetched, if that means to wait."""
        if not any(isinstance(each.place, Url) for each in self.sets):
            yield from ((num_rounds, self._read(readers, lanes, first, num_rounds)) for first, num_rounds in self._spans())
            return
        with ThreadPoolExecutor(1) as ahead:
            fetched = None
            for first, num_rounds in self._spans():
                following = num_rounds, ahead.submit(self._read, readers, lanes, first, num_rounds)
                if fetched is not None:
                    yield fetched[0], fetched[1].result()
                fetched = following
            if fetched is not None:
                yield fetched[0], fetched[1].result()

    def _spans(self) -> Iterator[tuple[int, int]]:
        """(first round, number of rounds) of window after window: small ones at first, since somebody is waiting."""
        first, num_rounds = self.start_round, self.piece_rounds
        while self.end_round is None or first < self.end_round:
            yield first, num_rounds if self.end_round is None else min(num_rounds, self.end_round - first)
            first += num_rounds
            if 2 * num_rounds <= self.window_rounds:
                num_rounds *= 2

    def _read(self, readers: Sequence[ShardReader], lanes: Sequence[int], first: int, num_rounds: int) -> list[Sample]:
        located = [self.order.locate_lane(lane, first, num_rounds) for lane in lanes]
        # [rounds, lanes], flat: round by round.
        sets, shards, samples = (np.stack(columns, axis=1).ravel() for columns in zip(*located, strict=True))
        found: list[Sample] = [None] * len(sets)  # type: ignore[list-item]
        for number, reader in enumerate(readers):
            places = np.flatnonzero(sets == number).tolist()
            read = reader.read_many(shards[places].tolist(), samples[places].tolist())
            for place, sample in zip(places, read, strict=True):
                found[place] = sample if len(readers) == 1 else self._joined(sample, number)
        return found

    def _joined(self, sample: Sample, number: int) -> Sample:
        """A sample of one set of a mixture, as a sample of the mixture."""
        source_map = self.source_maps[number]
        assert source_map is not None
        own = np.zeros(len(sample.lengths), np.uint8) if sample.sources is None else sample.sources
        return replace(sample, key=f"{self.sets[number].name}:{sample.key}", sources=source_map[own])


def _end_only_with_the_rank(worker: int) -> None:
    """Schedulers signal every process of a job, and Ctrl-C every process of a terminal. The rank finishes its step and
    saves; a loader worker that died of the signal meanwhile would take it along. So a worker heeds its rank alone."""
    asked = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    threading.Thread(target=_wait_for_the_rank, args=(asked,), daemon=True).start()


def _wait_for_the_rank(asked: set[signal.Signals]) -> None:
    while signal.sigwaitinfo(asked).si_pid != os.getppid():
        pass
    os._exit(0)


def _worker_share(lanes: Sequence[int]) -> Sequence[int]:
    worker = get_worker_info()
    if worker is None:
        return lanes
    return lanes[len(lanes) * worker.id // worker.num_workers : len(lanes) * (worker.id + 1) // worker.num_workers]


def _raise_if_error(piece: _Piece | DataError) -> _Piece:
    if isinstance(piece, DataError):
        raise piece
    return piece


def _as_it_is(piece: object) -> object:
    return piece
