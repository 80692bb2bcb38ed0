"""The order of shards in an epoch, and the shard at a position of it.

Shards are permuted by (seed, epoch). To find the shard at a position takes the cumulative sum of samples in that order, which
for a million shards takes a fifth of a second in every epoch. Very many shards are therefore assigned to random groups of
1,024, by the seed alone. An epoch permutes the groups, and the shards within each group; the first look-up of an epoch then
costs two sorts and two cumulative sums of about a thousand entries.

Taken by itself, each epoch is as random as a permutation of all shards. The trade-off is between epochs: the shards of a
group stay together in all of them.
"""

import numpy as np

from pipeline.data.lru_cache import LRUCache
from pipeline.data.permutation import GROUP_MEMBERS, GROUPS, SHARDS, permutation

# Up to this many shards are permuted as one group, which takes a few milliseconds.
_MAX_UNGROUPED = 2**15
_GROUP_SHARDS = 1024
_MAX_CACHED_GROUPS = 1024


class ShardOrder:
    """The permutation of shards in every epoch.

    Args:
        shard_samples: int64 [S], samples of each of S >= 1 shards.
        seed: of the run's order.
    """

    def __init__(self, shard_samples: np.ndarray, seed: int) -> None:
        self._samples = shard_samples
        self._seed = seed
        num_shards = len(shard_samples)

        # Shards in the order of their groups, and the samples of each group.
        self._is_grouped = num_shards > _MAX_UNGROUPED
        self._group_members = (
            permutation(num_shards, GROUP_MEMBERS, seed) if self._is_grouped else np.arange(num_shards, dtype=np.uint32)
        )
        self._size = _GROUP_SHARDS if self._is_grouped else num_shards
        self._group_samples = np.add.reduceat(shard_samples[self._group_members], np.arange(0, num_shards, self._size))
        self._group_orders: LRUCache[int, tuple[np.ndarray, np.ndarray]] = LRUCache(2)

        # Caches. Up to two epochs are in use; of many groups every lane uses another one at a time.
        capacity = min(2 * len(self._group_samples), _MAX_CACHED_GROUPS)
        self._shard_orders: LRUCache[tuple[int, int], tuple[np.ndarray, np.ndarray]] = LRUCache(capacity)

    def find(self, epoch: int, position: int) -> tuple[int, int]:
        """Find the shard at a sample position of the epoch: (shard index, position within the shard)."""
        group, within_group = _at(
            position, *self._group_orders.get(epoch, lambda: self._permuted_groups(epoch)), self._group_samples
        )
        return _at(
            within_group, *self._shard_orders.get((epoch, group), lambda: self._permuted_members(epoch, group)), self._samples
        )

    def _permuted_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        groups = permutation(len(self._group_samples), GROUPS, self._seed, epoch)
        return groups, np.cumsum(self._group_samples[groups])

    def _permuted_members(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        members = self._group_members[group * self._size : (group + 1) * self._size]
        name = (self._seed, epoch, group) if self._is_grouped else (self._seed, epoch)
        shards = members[permutation(len(members), SHARDS, *name)]
        return shards, np.cumsum(self._samples[shards])


def _at(position: int, items: np.ndarray, ends: np.ndarray, samples: np.ndarray) -> tuple[int, int]:
    """Find the item at a position, and the position within it; `ends` is the cumulative sum of the items' samples."""
    slot = int(np.searchsorted(ends, position, side="right"))
    item = int(items[slot])
    return item, position - (int(ends[slot]) - int(samples[item]))
