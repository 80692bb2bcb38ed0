"""The order of a run's rows, as a pure function of one integer: samples consumed so far.

An epoch permutes the shards (`shard_order`), and the samples within fixed blocks of each shard; the permuted sequence of S
samples is cut into L contiguous *lanes* of floor(S/L). Row n of the run is the next sample of lane n mod L. Ranks and loader
workers own lanes, but how many of them there are does not enter here: a job resumes on any number of them with the same rows
in the same steps. In an epoch no sample comes twice, and only the last S − L·floor(S/L) of its order are left out.

Blocks bound what shuffling costs: a lane walks through one block after the other, reads near one place, and finding a row
takes a search among shards and one block's permutation.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.loading.shard_order import ShardOrder
from pipeline.data.lru_cache import LeastRecentlyUsed
from pipeline.data.permutation import BLOCK, permutation

_MAX_LANES_BY_DEFAULT = 256
# A block's permutation is 4 bytes a sample; every lane of a process wants its own kept from round to round.
_MAX_CACHED_BLOCKS = 1024


def default_lanes(global_batch: int) -> int:
    """The largest divisor of `global_batch` that is at most 256."""
    return max(lanes for lanes in range(1, _MAX_LANES_BY_DEFAULT + 1) if global_batch % lanes == 0)


class EpochOrder:
    """Where each row of a run lies: (epoch, shard index, sample index).

    Raises:
        DataError: fewer samples than lanes.
    """

    def __init__(self, shard_samples: Sequence[int] | np.ndarray, *, lanes: int, seed: int, shuffle_block: int) -> None:
        self._shard_samples = np.array(shard_samples, dtype=np.int64)
        self.num_samples = int(self._shard_samples.sum())
        if self.num_samples < lanes:
            raise DataError(too_few_samples(self.num_samples, lanes))
        self.lanes = lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        self._shards = ShardOrder(self._shard_samples, seed)
        self._blocks: LeastRecentlyUsed[tuple[int, int, int], np.ndarray] = LeastRecentlyUsed(_MAX_CACHED_BLOCKS)

    @property
    def samples_per_lane(self) -> int:
        """Rounds in an epoch: floor(S/L)."""
        return self.num_samples // self.lanes

    @property
    def samples_per_epoch(self) -> int:
        """Rows that an epoch uses."""
        return self.samples_per_lane * self.lanes

    @property
    def dropped_per_epoch(self) -> int:
        """Samples, the last of each epoch's order, that an epoch leaves out; fewer than L."""
        return self.num_samples - self.samples_per_epoch

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Shard and sample at `position` (below S) of the epoch's permuted sequence."""
        ((shard, samples),) = self._stretches(epoch, position, 1)
        return shard, int(samples[0])

    def locate_row(self, row: int) -> tuple[int, int, int]:
        """Epoch, shard and sample of row `row` of the run."""
        consumed_rounds, lane = divmod(row, self.lanes)
        epoch, within_lane = divmod(consumed_rounds, self.samples_per_lane)
        return epoch, *self.locate(epoch, lane * self.samples_per_lane + within_lane)

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and samples, int64 [num_rounds], of one lane in consecutive rounds."""
        shards, samples = np.empty(num_rounds, np.int64), np.empty(num_rounds, np.int64)
        done = 0
        while done < num_rounds:
            epoch, within_lane = divmod(first_round + done, self.samples_per_lane)
            in_epoch = min(num_rounds - done, self.samples_per_lane - within_lane)
            for shard, found in self._stretches(epoch, lane * self.samples_per_lane + within_lane, in_epoch):
                shards[done : done + len(found)] = shard
                samples[done : done + len(found)] = found
                done += len(found)
        return shards, samples

    def _stretches(self, epoch: int, position: int, length: int) -> Iterator[tuple[int, np.ndarray]]:
        """The samples at `length` positions from `position` on, block by block: (shard, samples)."""
        while length:
            shard, within_shard = self._shards.find(epoch, position)
            block, within_block = divmod(within_shard, self.shuffle_block)
            found = self._block(epoch, shard, block)[within_block : within_block + length]
            yield shard, found.astype(np.int64) + block * self.shuffle_block
            position, length = position + len(found), length - len(found)

    def _block(self, epoch: int, shard: int, block: int) -> np.ndarray:
        return self._blocks.get((epoch, shard, block), lambda: self._permuted_block(epoch, shard, block))

    def _permuted_block(self, epoch: int, shard: int, block: int) -> np.ndarray:
        rest = int(self._shard_samples[shard]) - block * self.shuffle_block
        return permutation(min(self.shuffle_block, rest), BLOCK, self.seed, epoch, shard, block)


def too_few_samples(num_samples: int, lanes: int) -> str:
    """The sentence for S < L."""
    return (
        f"the data set has {num_samples} samples, fewer than data.lanes = {lanes}: every lane needs at least one; "
        "prepare more data, or choose a smaller data.lanes (and with it data.global_batch)"
    )
