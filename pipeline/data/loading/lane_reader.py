"""What one reader reads of a run: round after round of its lanes.

It reads a window of rounds at a time, which finds samples that lie side by side and, of remote data, is a matter of many
requests at once; it hands on a few rounds at a time, in few arrays, because what goes through a loader's pipe costs by the
piece.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import DataSet, MixtureOrder
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.reader import MAX_OPEN_SHARDS, ShardReader
from pipeline.data.shards.reference_losses import ReaderWithLosses
from pipeline.data.shards.sample import Sample
from pipeline.data.shards.table import ShardTable
from pipeline.storage.files import Access
from pipeline.storage.location import Url

Reader = ShardReader | ReaderWithLosses

# Of a worker's memory: what is read at a time, and what is handed on at a time.
_WINDOW_BYTES = 16 * 2**20
_PIECE_BYTES, _PIECE_ROWS = 2**20, 64


def rank_lanes(lanes: int, micro_batch: int, rank: int, world_size: int) -> list[int]:
    """The lanes of a rank, in the order of their rows within a round: L / R of them."""
    micro_step = micro_batch * world_size
    return [lane for start in range(rank * micro_batch, lanes, micro_step) for lane in range(start, start + micro_batch)]


@dataclass(frozen=True)
class Piece:
    """A worker's samples of a few rounds, round after round, in few arrays: `tokens` [N, T], `keys` and `damage` [N],
    `counts` int64 [N], the documents of each, whose lengths and sources follow one another in `lengths` and `sources`;
    `reference_losses` [N, T, C]."""

    num_rounds: int
    tokens: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None
    reference_losses: np.ndarray | None
    keys: list[str]
    damage: dict[int, str]

    @classmethod
    def of(cls, num_rounds: int, samples: Sequence[Sample]) -> "Piece":
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
                None if self.reference_losses is None else self.reference_losses[number],
            )
            for number, (key, start, end) in enumerate(zip(self.keys, [0, *ends], ends, strict=False))
        ]
        in_round = len(samples) // self.num_rounds
        return [samples[start : start + in_round] for start in range(0, len(samples), in_round)]


def put_together(pieces: Sequence[Piece]) -> list[Sample]:
    """The samples of the workers' pieces of the same rounds, round by round in the order of the workers."""
    by_round = zip(*(piece.samples_by_round() for piece in pieces), strict=True)
    return [sample for parts in by_round for part in parts for sample in part]


class LaneRounds(IterableDataset):
    """A rank's samples of round after round: in a DataLoader worker those of its contiguous share of the lanes.

    Args:
        sets, manifests: of the run. source_maps: for each set what turns its source indices into those of all sets together;
            None: nothing to do.
        order, access: of the run. lanes: the rank's. start_round, end_round: what to read; None: for ever.

    What is passed to the workers holds no open file.
    """

    def __init__(
        self,
        sets: Sequence[DataSet],
        manifests: Sequence[Manifest],
        source_maps: Sequence[np.ndarray | None],
        order: MixtureOrder,
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
        num_bytes = sum(int(ShardTable.of(manifest.shards).sizes.sum()) for manifest in manifests)
        row_bytes = max(1, num_bytes // sum(manifest.num_samples for manifest in manifests))
        self.piece_rounds = max(1, min(_PIECE_ROWS, _PIECE_BYTES // row_bytes) // len(lanes))
        self.window_rounds = max(1, _WINDOW_BYTES // row_bytes // len(lanes))

    def __iter__(self) -> Iterator[Piece | DataError]:
        # An error goes out as a value: raised here, the DataLoader would bury its message in a traceback.
        open_shards = max(1, MAX_OPEN_SHARDS // len(self.sets))
        readers = [
            _reader(each, manifest, self.access, open_shards) for each, manifest in zip(self.sets, self.manifests, strict=True)
        ]
        lanes = _worker_share(self.lanes)
        try:
            for num_rounds, samples in self._windows(readers, lanes):
                for first in range(0, num_rounds, self.piece_rounds):
                    in_piece = min(self.piece_rounds, num_rounds - first)
                    yield Piece.of(in_piece, samples[first * len(lanes) : (first + in_piece) * len(lanes)])
        except DataError as error:
            yield error
        finally:
            for reader in readers:
                reader.close()

    def _windows(self, readers: Sequence[Reader], lanes: Sequence[int]) -> Iterator[tuple[int, list[Sample]]]:
        """Window after window: its number of rounds, and its samples round by round. While one is handed on the next one is
        fetched, if that means to wait."""
        if not any(isinstance(each.place, Url) for each in self.sets):
            yield from ((num_rounds, self._read(readers, lanes, first, num_rounds)) for first, num_rounds in self._spans())
            return
        ahead = ThreadPoolExecutor(1)
        try:
            fetched = None
            for first, num_rounds in self._spans():
                following = num_rounds, ahead.submit(self._read, readers, lanes, first, num_rounds)
                if fetched is not None:
                    yield fetched[0], fetched[1].result()
                fetched = following
            if fetched is not None:
                yield fetched[0], fetched[1].result()
        finally:
            # Without waiting, for the reason that `ShardReader.close` has.
            ahead.shutdown(wait=False, cancel_futures=True)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """(first round, number of rounds) of window after window: small ones at first, since somebody is waiting."""
        first, num_rounds = self.start_round, self.piece_rounds
        while self.end_round is None or first < self.end_round:
            yield first, num_rounds if self.end_round is None else min(num_rounds, self.end_round - first)
            first += num_rounds
            if 2 * num_rounds <= self.window_rounds:
                num_rounds *= 2

    def _read(self, readers: Sequence[Reader], lanes: Sequence[int], first: int, num_rounds: int) -> list[Sample]:
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


def _reader(each: DataSet, manifest: Manifest, access: Access, max_open_shards: int) -> Reader:
    reader = ShardReader(each.place, manifest, access, max_open_shards)
    return reader if each.losses is None else ReaderWithLosses(reader, each.losses, max_open_shards)


def _worker_share(lanes: Sequence[int]) -> Sequence[int]:
    worker = get_worker_info()
    if worker is None:
        return lanes
    return lanes[len(lanes) * worker.id // worker.num_workers : len(lanes) * (worker.id + 1) // worker.num_workers]
