"""Stateless permutations: each is a pure function of its name, a few integers.

The order of samples must be the same on every machine, with every version of numpy, whenever a run is resumed. numpy does not
guarantee that: the streams of its Generators may change between versions. A permutation here is a stable argsort of keys that
are hashed by SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195), which takes nine lines and never changes.
"""

import numpy as np

# The first integer of a name says what is permuted, so that permutations of different kinds are independent.
SHARDS, BLOCK, DOCUMENTS, WORDS, COPIES, ROWS, GROUP_MEMBERS, GROUPS, DIGEST = range(1, 10)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def permutation(length: int, *name: int) -> np.ndarray:
    """Compute the permutation of range(length) with this name (any integers; their order matters): uint32 [length]."""
    return np.argsort(sort_keys(np.arange(length, dtype=np.uint64), *name), kind="stable").astype(np.uint32)


def sort_keys(numbers: np.ndarray, *name: int) -> np.ndarray:
    """Compute the keys, uint64 [n], by which the permutation with this name sorts `numbers`, uint64 [n].

    Different numbers have different keys. So items can be shuffled by their keys in several parts, without numbering them all.
    """
    return _mix(np.uint64(_fold(name)) + (numbers + np.uint64(1)) * np.uint64(_GOLDEN))


def _mix(keys: np.ndarray) -> np.ndarray:
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(_MIX_1)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(_MIX_2)
    return keys ^ (keys >> np.uint64(31))


def _fold(words: tuple[int, ...]) -> int:
    state = 0
    for word in words:
        state = _mix_one(((state ^ (word & _MASK)) + _GOLDEN) & _MASK)
    return state


def _mix_one(key: int) -> int:
    key = ((key ^ (key >> 30)) * _MIX_1) & _MASK
    key = ((key ^ (key >> 27)) * _MIX_2) & _MASK
    return key ^ (key >> 31)
