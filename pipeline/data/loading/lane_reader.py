"""Reading lanes: a DataLoader worker reads its lanes round by round and yields chunks of a few rounds.

Reads and hand-overs have different sizes. A worker reads a window of many rounds at once: neighbouring samples are then read
together, and remote data is fetched by many requests in parallel. It yields chunks of a few rounds, each as a few large
arrays, because sending an object through a worker's pipe has a fixed cost per array.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import DataSet
from pipeline.data.loading.skipping import RowOrder
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.reader import MAX_OPEN_SHARDS, ShardReader
from pipeline.data.shards.reference_losses import ReaderWithLosses
from pipeline.data.shards.sample import Sample
from pipeline.data.shards.table import ShardTable
from pipeline.storage.files import Access
from pipeline.storage.location import Url

Reader = ShardReader | ReaderWithLosses

PADDING = -1
"""The set of a row of padding, in an order that ends."""

# Memory of a worker: bytes read at a time, and bytes or rows yielded at a time.
_WINDOW_BYTES = 16 * 2**20
_CHUNK_BYTES, _CHUNK_ROWS = 2**20, 64


def rank_lanes(lanes: int, micro_batch: int, rank: int, world_size: int) -> list[int]:
    """List the L / R lanes of a rank, in the order of their rows within a round."""
    micro_step = micro_batch * world_size
    return [lane for start in range(rank * micro_batch, lanes, micro_step) for lane in range(start, start + micro_batch)]


@dataclass(frozen=True)
class RoundsChunk:
    """A worker's N samples of a few consecutive rounds, ordered by round, as a few large arrays.

    num_rounds: rounds in the chunk; each has N / num_rounds samples.
    tokens: uint16 or uint32 [N, T].
    counts: int64 [N], the number of documents in each sample.
    lengths, sources: uint32 and uint8, the documents' lengths and sources, of all samples concatenated.
    reference_losses: float32 [N, T, C]; None if none are cached.
    keys: `SHARD/KEY` of each sample.
    numbers: `Sample.number` of each sample.
    damage: the message of each damaged sample, by its index.
    """

    num_rounds: int
    tokens: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None
    reference_losses: np.ndarray | None
    keys: list[str]
    numbers: list[int]
    damage: dict[int, str]

    @classmethod
    def of(cls, num_rounds: int, samples: Sequence[Sample]) -> "RoundsChunk":
        """Stack samples, ordered by round, into a chunk."""
        return cls(
            num_rounds,
            np.stack([sample.tokens for sample in samples]),
            np.array([len(sample.lengths) for sample in samples]),
            np.concatenate([sample.lengths for sample in samples]),
            None
            if samples[0].sources is None
            else np.concatenate([sample.sources for sample in samples if sample.sources is not None]),
            None
            if samples[0].reference_losses is None
            else np.stack([sample.reference_losses for sample in samples if sample.reference_losses is not None]),
            [sample.key for sample in samples],
            [sample.number for sample in samples],
            {number: sample.damage for number, sample in enumerate(samples) if sample.damage is not None},
        )

    def samples_by_round(self) -> list[list[Sample]]:
        """Unstack the chunk: the samples of each round."""
        # Samples, with their documents' lengths and sources between the cumulative sums of their numbers.
        ends = np.cumsum(self.counts).tolist()
        samples = [
            Sample(
                key,
                self.tokens[number],
                self.lengths[start:end],
                None if self.sources is None else self.sources[start:end],
                self.damage.get(number),
                None if self.reference_losses is None else self.reference_losses[number],
                self.numbers[number],
            )
            for number, (key, start, end) in enumerate(zip(self.keys, [0, *ends], ends, strict=False))
        ]

        in_round = len(samples) // self.num_rounds
        return [samples[start : start + in_round] for start in range(0, len(samples), in_round)]


def merge_chunks(chunks: Sequence[RoundsChunk]) -> list[Sample]:
    """Interleave the workers' chunks of the same rounds: round by round, in the order of the workers."""
    by_round = zip(*(chunk.samples_by_round() for chunk in chunks), strict=True)
    return [sample for of_workers in by_round for of_worker in of_workers for sample in of_worker]


class LaneRounds(IterableDataset):
    """The rounds of a rank's lanes, as an IterableDataset; a DataLoader worker reads a contiguous share of the lanes.

    It opens files only in `__iter__`, so that it can be sent to worker processes.

    Args:
        sets: the data sets of the run.
        manifests: one for each set.
        source_maps: for each set uint8 [sources of the set], the index of each source among those of all sets; None if the
            indices need no change.
        order: of the run's rows.
        access: to data that is not on this machine.
        lanes: of the rank.
        start_round: the first round to read.
        end_round: the round to stop before; None to read without end.
    """

    def __init__(
        self,
        sets: Sequence[DataSet],
        manifests: Sequence[Manifest],
        source_maps: Sequence[np.ndarray | None],
        order: RowOrder,
        access: Access,
        *,
        lanes: Sequence[int],
        start_round: int,
        end_round: int | None,
    ) -> None:
        self.sets = sets
        self.manifests = manifests
        self.source_maps = source_maps
        self.order = order
        self.access = access
        self.lanes = lanes
        self.start_round = start_round
        self.end_round = end_round

        # How many rounds make a chunk and a window, from the average size of a row.
        sizes = [manifest.num_samples for manifest in manifests]
        self.samples_before = list(itertools.accumulate(sizes, initial=0))
        num_bytes = sum(int(ShardTable.of(manifest.shards).sizes.sum()) for manifest in manifests)
        row_bytes = max(1, num_bytes // sum(sizes))
        self.chunk_rounds = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes) // len(lanes))
        self.window_rounds = max(1, _WINDOW_BYTES // row_bytes // len(lanes))

    def __iter__(self) -> Iterator[RoundsChunk | DataError]:
        # One reader for each set; together they respect the bound on open shards.
        open_shards = max(1, MAX_OPEN_SHARDS // len(self.sets))
        readers = [
            _reader(each, manifest, self.access, open_shards) for each, manifest in zip(self.sets, self.manifests, strict=True)
        ]
        lanes = _worker_share(self.lanes)

        # A DataError is yielded instead of raised: the DataLoader would wrap its message in a worker's traceback.
        try:
            for num_rounds, samples in self._windows(readers, lanes):
                for first in range(0, num_rounds, self.chunk_rounds):
                    in_chunk = min(self.chunk_rounds, num_rounds - first)
                    yield RoundsChunk.of(in_chunk, samples[first * len(lanes) : (first + in_chunk) * len(lanes)])
        except DataError as error:
            yield error
        finally:
            for reader in readers:
                reader.close()

    def _windows(self, readers: Sequence[Reader], lanes: Sequence[int]) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the windows: the number of rounds and the samples, ordered by round. Remote data is read one window ahead."""
        if not any(isinstance(each.location, Url) for each in self.sets):
            yield from (
                (num_rounds, self._read(readers, lanes, first, num_rounds)) for first, num_rounds in self._window_ranges()
            )
            return

        # Remote: one thread reads the next window while the current one is consumed.
        executor = ThreadPoolExecutor(1)
        try:
            fetched = None
            for first, num_rounds in self._window_ranges():
                following = num_rounds, executor.submit(self._read, readers, lanes, first, num_rounds)
                if fetched is not None:
                    yield fetched[0], fetched[1].result()
                fetched = following
            if fetched is not None:
                yield fetched[0], fetched[1].result()
        finally:
            # Do not wait, for the reason given in `ShardReader.close`.
            executor.shutdown(wait=False, cancel_futures=True)

    def _window_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (first round, number of rounds) of each window. Windows start small, to deliver the first batch soon, and
        double up to their full size."""
        first, num_rounds = self.start_round, self.chunk_rounds
        while self.end_round is None or first < self.end_round:
            yield first, num_rounds if self.end_round is None else min(num_rounds, self.end_round - first)
            first += num_rounds
            if 2 * num_rounds <= self.window_rounds:
                num_rounds *= 2

    def _read(self, readers: Sequence[Reader], lanes: Sequence[int], first: int, num_rounds: int) -> list[Sample]:
        # Locate the samples: arrays [rounds, lanes], flattened round by round.
        located = [self.order.locate_lane(lane, first, num_rounds) for lane in lanes]
        sets, shards, samples = (np.stack(columns, axis=1).ravel() for columns in zip(*located, strict=True))

        # Read each set's samples in one call, and put them back in order.
        found = [readers[0].padding()] * len(sets)
        for number, reader in enumerate(readers):
            positions = np.flatnonzero(sets == number).tolist()
            read = reader.read_many(shards[positions].tolist(), samples[positions].tolist())
            for position, sample in zip(positions, read, strict=True):
                found[position] = sample if len(readers) == 1 else self._joined(sample, number)
        return found

    def _joined(self, sample: Sample, number: int) -> Sample:
        """Translate a sample's key, number and source indices from its own set to the mixture."""
        source_map = self.source_maps[number]
        assert source_map is not None
        own = np.zeros(len(sample.lengths), np.uint8) if sample.sources is None else sample.sources
        key, place = f"{self.sets[number].name}:{sample.key}", self.samples_before[number] + sample.number
        return replace(sample, key=key, sources=source_map[own], number=place)


def _reader(each: DataSet, manifest: Manifest, access: Access, max_open_shards: int) -> Reader:
    reader = ShardReader(each.location, manifest, access, max_open_shards)
    return reader if each.losses is None else ReaderWithLosses(reader, each.losses, max_open_shards)


def _worker_share(lanes: Sequence[int]) -> Sequence[int]:
    worker = get_worker_info()
    if worker is None:
        return lanes
    return lanes[len(lanes) * worker.id // worker.num_workers : len(lanes) * (worker.id + 1) // worker.num_workers]
