"""A digest of the samples of a step: one number that tells which sample lay in which row, whatever ranks read them.

    digest = Σ over rows of hash(row, sample)   (mod 2^64)

A sum can be taken over ranks in any order, and it travels with the counts that are summed anyway. The row's number in the order
of the run is hashed along, so that the same samples in another order have another digest. It guards against mistakes, not
against forgery.
"""

import numpy as np

from pipeline.data.permutation import DIGEST, sort_keys

_HALF = 32


def sample_digest(rows: np.ndarray, numbers: np.ndarray) -> int:
    """Compute the digest of samples in their rows.

    rows: int64 [N], numbers of rows in the order of the run. numbers: int64 [N], the place of each row's sample among all
    samples of the data (`Sample.number`).
    """
    return int(row_hashes(rows, numbers).sum(dtype=np.uint64))


def row_hashes(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Hash each row with its sample: uint64 [N], whose sum is the digest."""
    samples = sort_keys(numbers.astype(np.uint64), DIGEST)
    return sort_keys(samples + rows.astype(np.uint64), DIGEST)


def parts(digest: int) -> list[int]:
    """Split a digest into two numbers whose sums over ranks stay within int64."""
    return [digest >> _HALF, digest & ((1 << _HALF) - 1)]


def joined(high: int, low: int) -> int:
    """Join the sums over ranks of `parts` to the digest of all of them."""
    return ((high << _HALF) + low) & ((1 << 2 * _HALF) - 1)
