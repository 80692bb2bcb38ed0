"""In which order an epoch takes the shards, and which of them holds a position.

The shards are permuted by (seed, epoch), and finding a position takes running sums of their samples in that order: for a
million shards a fifth of a second, in each epoch anew. So many shards are first dealt into groups of 1,024, at random by the
seed alone; an epoch permutes the groups, and the shards within each group. A group's sum is the same in all epochs, so that an
epoch's first look-up costs two sorts and sums of a thousand. Each epoch by itself is as good a shuffle as one of all
shards at once, because groups are random and their order and insides are; only, which shards are in a group stays.
"""

import numpy as np

from pipeline.data.lru_cache import LeastRecentlyUsed
from pipeline.data.permutation import DEALT, GROUPS, SHARDS, permutation

# Permuting this many takes a few milliseconds.
_MOST_AS_ONE_GROUP = 2**15
_GROUP = 1024
_MAX_CACHED_GROUPS = 1024


class ShardOrder:
    """The order of the shards in every epoch.

    Args:
        shard_samples: int64 [number of shards], at least one.
        seed: of the run's order.
    """

    def __init__(self, shard_samples: np.ndarray, seed: int) -> None:
        self._samples = shard_samples
        self._seed = seed
        num_shards = len(shard_samples)
        self._is_grouped = num_shards > _MOST_AS_ONE_GROUP
        self._dealt = permutation(num_shards, DEALT, seed) if self._is_grouped else np.arange(num_shards, dtype=np.uint32)
        self._size = _GROUP if self._is_grouped else num_shards
        self._group_samples = np.add.reduceat(shard_samples[self._dealt], np.arange(0, num_shards, self._size))
        self._epochs: LeastRecentlyUsed[int, tuple[np.ndarray, np.ndarray]] = LeastRecentlyUsed(2)
        # One group is large, and there are two of it; of many each lane has its own at a time.
        capacity = min(2 * len(self._group_samples), _MAX_CACHED_GROUPS)
        self._members: LeastRecentlyUsed[tuple[int, int], tuple[np.ndarray, np.ndarray]] = LeastRecentlyUsed(capacity)

    def find(self, epoch: int, position: int) -> tuple[int, int]:
        """The shard at `position` of the epoch's sequence of samples, and how many of its samples come before."""
        group, within_group = _at(position, *self._epochs.get(epoch, lambda: self._permuted_groups(epoch)), self._group_samples)
        return _at(
            within_group, *self._members.get((epoch, group), lambda: self._permuted_members(epoch, group)), self._samples
        )

    def _permuted_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        groups = permutation(len(self._group_samples), GROUPS, self._seed, epoch)
        return groups, np.cumsum(self._group_samples[groups])

    def _permuted_members(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        members = self._dealt[group * self._size : (group + 1) * self._size]
        name = (self._seed, epoch, group) if self._is_grouped else (self._seed, epoch)
        shards = members[permutation(len(members), SHARDS, *name)]
        return shards, np.cumsum(self._samples[shards])


def _at(position: int, items: np.ndarray, ends: np.ndarray, samples: np.ndarray) -> tuple[int, int]:
    """The item that holds a position, where `ends` are running sums of the items' samples, and how far into it that is."""
    slot = int(np.searchsorted(ends, position, side="right"))
    item = int(items[slot])
    return item, position - (int(ends[slot]) - int(samples[item]))
