"""Micro-batches of random tokens in documents of given lengths, put together as training does."""

from dataclasses import replace

import numpy as np
import torch

from pipeline.data.loading.batch import Batch, collate
from pipeline.data.shards.sample import Sample


def batch_of(lengths: list[list[int]], sequence_length: int, vocab_size: int, seed: int = 0) -> Batch:
    """A row for each list of documents' lengths; what they leave is padding."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(len(lengths), sequence_length), dtype=np.uint32)
    return batch_with(tokens, lengths)


def batch_with(tokens_BT: np.ndarray | torch.Tensor, lengths: list[list[int]]) -> Batch:
    """The same of given tokens."""
    rows = zip(np.asarray(tokens_BT, np.uint32), lengths, strict=True)
    return collate(
        [Sample(f"shard/{number}", row, np.array(of_row, np.uint32), None) for number, (row, of_row) in enumerate(rows)]
    )


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    lengths: list[list[int]] = [[] for _ in batch.keys]
    for row, length in zip(batch.documents.rows_D.tolist(), batch.documents.lengths_D.tolist(), strict=True):
        lengths[row].append(length)
    return replace(batch_with(batch.tokens_BT[rows], lengths[rows]), keys=batch.keys[rows])


def random_lengths(num_rows: int, sequence_length: int, seed: int) -> list[list[int]]:
    """Documents of one token up to half a row, and a little padding in most rows."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        lengths: list[int] = []
        used = int(generator.integers(4))
        while used < sequence_length:
            length = min(int(generator.integers(1, sequence_length // 2)), sequence_length - used)
            lengths.append(length)
            used += length
        rows.append(lengths)
    return rows
