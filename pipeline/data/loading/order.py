"""The order of a run's rows, as a pure function of one integer: samples consumed so far.

An epoch permutes the shards (`shard_order`), and the samples within fixed blocks of each shard. The permuted sequence of S
samples is cut into L contiguous *lanes* of floor(S/L) samples. Row n of the run is the next sample of lane n mod L. In an
epoch no sample comes twice, and only the last S − L·floor(S/L) samples of its order are dropped.

Ranks and loader workers own lanes, but their number does not enter the order. A job therefore resumes on any number of ranks
and workers with the same rows in the same steps.

Blocks bound the cost of shuffling, at the price of a less thorough shuffle: a lane reads one block after the other, so its
reads stay close together, and locating a row takes one search among shards and the permutation of one block.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.loading.shard_order import ShardOrder
from pipeline.data.lru_cache import LRUCache
from pipeline.data.permutation import BLOCK, permutation

_MAX_LANES_BY_DEFAULT = 256
# Every lane of a process is in a block of its own, whose permutation (4 bytes a sample) is needed again in each round.
_MAX_CACHED_BLOCKS = 1024


def default_lanes(global_batch: int) -> int:
    """Return the largest divisor of `global_batch` that is at most 256."""
    return max(lanes for lanes in range(1, _MAX_LANES_BY_DEFAULT + 1) if global_batch % lanes == 0)


class EpochOrder:
    """The order of one data set's rows, epoch after epoch.

    Args:
        shard_samples: samples of each shard.
        lanes: L.
        seed: of the permutations.
        shuffle_block: samples in a block.

    Raises:
        DataError: there are fewer samples than lanes.
    """

    def __init__(self, shard_samples: Sequence[int] | np.ndarray, *, lanes: int, seed: int, shuffle_block: int) -> None:
        self.shard_samples = np.array(shard_samples, dtype=np.int64)
        self.num_samples = int(self.shard_samples.sum())
        if self.num_samples < lanes:
            raise DataError(too_few_samples(self.num_samples, lanes))
        self.lanes = lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        self._shards = ShardOrder(self.shard_samples, seed)
        self._blocks: LRUCache[tuple[int, int, int], np.ndarray] = LRUCache(_MAX_CACHED_BLOCKS)

    @property
    def samples_per_lane(self) -> int:
        """Samples of a lane in an epoch, floor(S/L); also the number of rounds in an epoch."""
        return self.num_samples // self.lanes

    @property
    def samples_per_epoch(self) -> int:
        """Rows of an epoch, L·floor(S/L)."""
        return self.samples_per_lane * self.lanes

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that an epoch drops, fewer than L: the last ones of its order."""
        return self.num_samples - self.samples_per_epoch

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Locate the sample at `position` (below S) of an epoch's permuted sequence: (shard index, sample index)."""
        ((shard, samples),) = self._located_by_block(epoch, position, 1)
        return shard, int(samples[0])

    def locate_row(self, row: int) -> tuple[int, int, int]:
        """Locate row `row` of the run: (epoch, shard index, sample index)."""
        consumed_rounds, lane = divmod(row, self.lanes)
        epoch, within_lane = divmod(consumed_rounds, self.samples_per_lane)
        return epoch, *self.locate(epoch, lane * self.samples_per_lane + within_lane)

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """Locate the samples of one lane in consecutive rounds: shard and sample indices, int64 [num_rounds] each."""
        shards, samples = np.empty(num_rounds, np.int64), np.empty(num_rounds, np.int64)
        done = 0
        while done < num_rounds:
            epoch, within_lane = divmod(first_round + done, self.samples_per_lane)
            in_epoch = min(num_rounds - done, self.samples_per_lane - within_lane)
            for shard, found in self._located_by_block(epoch, lane * self.samples_per_lane + within_lane, in_epoch):
                shards[done : done + len(found)] = shard
                samples[done : done + len(found)] = found
                done += len(found)
        return shards, samples

    def _located_by_block(self, epoch: int, position: int, length: int) -> Iterator[tuple[int, np.ndarray]]:
        """Locate `length` samples from `position` on, and yield them block by block: (shard index, sample indices)."""
        while length:
            shard, within_shard = self._shards.find(epoch, position)
            block, within_block = divmod(within_shard, self.shuffle_block)
            found = self._block(epoch, shard, block)[within_block : within_block + length]
            yield shard, found.astype(np.int64) + block * self.shuffle_block
            position, length = position + len(found), length - len(found)

    def _block(self, epoch: int, shard: int, block: int) -> np.ndarray:
        return self._blocks.get((epoch, shard, block), lambda: self._permuted_block(epoch, shard, block))

    def _permuted_block(self, epoch: int, shard: int, block: int) -> np.ndarray:
        rest = int(self.shard_samples[shard]) - block * self.shuffle_block
        return permutation(min(self.shuffle_block, rest), BLOCK, self.seed, epoch, shard, block)


def too_few_samples(num_samples: int, lanes: int) -> str:
    """Format the error message for S < L."""
    return (
        f"the data set has {num_samples} samples, fewer than data.lanes = {lanes}: every lane needs at least one; "
        "prepare more data, or choose a smaller data.lanes (and with it data.global_batch)"
    )
