"""The rows of one rank, as micro-batches, from any position of the run.

The position of the whole job is one integer, samples consumed, and what comes at a position is `order`'s pure function of
it. This module only says who reads what. A *round* is one sample of each of the L lanes; a step of G rows is G / L rounds,
and micro-step a of a step holds its rows [a·R·B, (a+1)·R·B), of which rank r has a·R·B + r·B + [0, B). L is a multiple of
R·B, so each lane is read by one rank for as long as the number of ranks stays.

A rank's lanes are split over its DataLoader workers, which own lanes and not batches: each yields its piece of every round,
the DataLoader hands the pieces out in turn, and their concatenation is the rank's part of the round in the order of its
rows. So the number of workers changes nothing but speed. Pieces travel as numpy arrays through a pipe, and not as
tensors through /dev/shm, which containers keep small.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.batch import Batch, collate
from pipeline.data.manifest import DataError, Manifest, read_manifest
from pipeline.data.order import EpochOrder, default_lanes, too_few_samples
from pipeline.data.shard_reader import Sample, ShardReader

__all__ = ["Stream", "check_sizes", "default_lanes", "rank_lanes"]

_MAX_LISTED = 12


class Stream:
    """One rank's view of a prepared folder.

    Args:
        directory: the prepared folder.
        lanes: L. global_batch: G, rows a step. micro_batch: B, rows a rank and micro-step.
        rank, world_size: of this process, R.
        seed, shuffle_block: of the order; both are part of what a run is.
        num_workers: DataLoader processes; 0 reads in this process.

    Raises:
        DataError: the folder is not a prepared one, or the sizes do not fit (all problems at once).
    """

    def __init__(
        self,
        directory: Path,
        *,
        lanes: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_block: int,
        num_workers: int = 0,
    ) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory)
        problems = check_sizes(
            lanes=lanes,
            global_batch=global_batch,
            micro_batch=micro_batch,
            world_size=world_size,
            num_workers=num_workers,
            num_samples=self.manifest.num_samples,
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
        self.order = EpochOrder(
            [shard.samples for shard in self.manifest.shards], lanes=lanes, seed=seed, shuffle_block=shuffle_block
        )

    @property
    def lanes(self) -> int:
        """L."""
        return self.order.lanes

    @property
    def samples_per_epoch(self) -> int:
        """Rows that an epoch uses, over all ranks."""
        return self.order.samples_per_epoch

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that an epoch leaves out, fewer than L."""
        return self.order.dropped_per_epoch

    @property
    def micro_steps(self) -> int:
        """A: micro-batches of this rank in a step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def iterate(self, start_sample: int = 0, *, end_sample: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of the rows [start_sample, end_sample), in order; without an end, for ever.

        Raises:
            DataError: a sample is damaged; the message names it.
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
        for samples in self._rounds(start_round, end_round):
            for start in range(0, len(samples), self.micro_batch):
                yield collate(samples[start : start + self.micro_batch])

    def _rounds(self, start_round: int, end_round: int | None) -> Iterator[list[Sample]]:
        """This rank's samples of each round, in the order of the rows."""
        lanes = rank_lanes(self.lanes, self.micro_batch, self.rank, self.world_size)
        dataset = _LaneRounds(self.directory, self.manifest, self.order, lanes, start_round, end_round)
        if self.num_workers == 0:
            yield from map(_raise_if_error, dataset)
            return
        # The loader draws a seed for its workers; from a generator of its own, lest it move the job's random state.
        loader = DataLoader(
            dataset, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is, generator=torch.Generator()
        )
        pieces = map(_raise_if_error, loader)
        try:
            while first := next(pieces, None):
                rest = [next(pieces) for _ in range(self.num_workers - 1)]
                yield list(itertools.chain(first, *rest))
        finally:
            # Stops the workers here. Left to the garbage collector, which closes their queues before it asks them to stop,
            # an error would cost five seconds a worker.
            del pieces


def rank_lanes(lanes: int, micro_batch: int, rank: int, world_size: int) -> list[int]:
    """The lanes of a rank, in the order of their rows within a round: L / R of them."""
    micro_step = micro_batch * world_size
    return [lane for start in range(rank * micro_batch, lanes, micro_step) for lane in range(start, start + micro_batch)]


class _LaneRounds(IterableDataset):
    """A rank's samples of round after round: in a DataLoader worker those of its contiguous share of the lanes.

    What is passed to the workers is small and holds no open file.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        order: EpochOrder,
        lanes: Sequence[int],
        start_round: int,
        end_round: int | None,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.order = order
        self.lanes = lanes
        self.start_round = start_round
        self.end_round = end_round

    def __iter__(self) -> Iterator[list[Sample] | DataError]:
        # An error goes out as a value: raised here, the DataLoader would bury its message in a traceback.
        reader = ShardReader(self.directory, self.manifest)
        try:
            for number in itertools.count(self.start_round):
                if number == self.end_round:
                    return
                yield [self._read(reader, number * self.order.lanes + lane) for lane in _worker_share(self.lanes)]
        except DataError as error:
            yield error
        finally:
            reader.close()

    def _read(self, reader: ShardReader, row: int) -> Sample:
        _, shard, sample = self.order.locate_row(row)
        return reader.read(shard, sample)


def _worker_share(lanes: Sequence[int]) -> Sequence[int]:
    worker = get_worker_info()
    if worker is None:
        return lanes
    return lanes[len(lanes) * worker.id // worker.num_workers : len(lanes) * (worker.id + 1) // worker.num_workers]


def _raise_if_error(piece: list[Sample] | DataError) -> list[Sample]:
    if isinstance(piece, DataError):
        raise piece
    return piece


def _as_it_is(piece: object) -> object:
    return piece


def check_sizes(
    *,
    lanes: int,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    num_workers: int = 0,
    num_samples: int | None = None,
) -> list[str]:
    """What does not fit, as sentences that say what would; empty if all fits."""
    sizes = {
        "data.lanes": lanes,
        "data.global_batch": global_batch,
        "data.micro_batch": micro_batch,
        "the number of ranks": world_size,
    }
    problems = [f"{name} = {size}: expected at least 1" for name, size in sizes.items() if size < 1]
    if num_workers < 0:
        problems.append(f"data.num_workers = {num_workers}: expected at least 0")
    if problems:
        return problems
    if global_batch % lanes:
        problems.append(
            f"data.global_batch = {global_batch} is not a multiple of data.lanes = {lanes}; "
            f"lanes that fit: {_listed(_divisors(global_batch), near=lanes)}"
        )
    problems += _rank_problems(lanes, micro_batch, world_size, num_workers)
    if num_samples is not None and num_samples < lanes:
        problems.append(too_few_samples(num_samples, lanes))
    return problems


def _rank_problems(lanes: int, micro_batch: int, world_size: int, num_workers: int) -> list[str]:
    if lanes % (world_size * micro_batch):
        return [
            f"data.lanes = {lanes} is not a multiple of ranks × data.micro_batch = {world_size} × {micro_batch}; "
            f"with micro-batches of {micro_batch}, numbers of ranks that fit: "
            f"{_listed(_divisors(lanes // micro_batch) if lanes % micro_batch == 0 else [], near=world_size)}; "
            f"with {world_size} ranks, micro-batches that fit: "
            f"{_listed(_divisors(lanes // world_size) if lanes % world_size == 0 else [], near=micro_batch)}"
        ]
    own_lanes = lanes // world_size
    if num_workers > own_lanes:
        return [
            f"data.num_workers = {num_workers}, but each of the {world_size} ranks has {own_lanes} of the {lanes} lanes and a "
            f"worker needs one of its own: expected at most {own_lanes}"
        ]
    return []


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int], near: int) -> str:
    """The numbers, of many those nearest to `near`."""
    nearest = sorted(sorted(numbers, key=lambda number: abs(number - near))[:_MAX_LISTED])
    return ", ".join(map(str, nearest)) or "none"
