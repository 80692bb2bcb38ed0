"""Packing: documents one after the other, cut into rows of exactly T tokens.

No token is lost and none is padding but at the end of the last row. A document that crosses the end of a row continues in
the next one as a document of its own: attention and prediction stay within a row's documents, so its second piece starts
without context. That is the field's usual trade; the alternative, best-fit packing (arXiv 2404.10830), cuts fewer documents
for the price of a sort.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One packed row: `tokens` uint32 [T]; `lengths` uint32 and `sources` uint8, one entry for each document in it.

    Positions from sum(lengths) on are padding.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray


def pack(documents: Iterable[tuple[np.ndarray, int]], sequence_length: int, *, padding_id: int) -> Iterator[Row]:
    """Pack documents (ids [n], n ≥ 1, and the index of their source) into rows of `sequence_length` tokens, in order."""
    row = _OpenRow(sequence_length, padding_id)
    for ids, source in documents:
        assert len(ids) > 0
        start = 0
        while start < len(ids):
            start += row.take(ids[start:], source)
            if row.is_full:
                yield row.close()
                row = _OpenRow(sequence_length, padding_id)
    if row.lengths:
        yield row.close()


class _OpenRow:
    def __init__(self, sequence_length: int, padding_id: int) -> None:
        self.tokens = np.full(sequence_length, padding_id, dtype=np.uint32)
        self.used = 0
        self.lengths: list[int] = []
        self.sources: list[int] = []

    @property
    def is_full(self) -> bool:
        return self.used == len(self.tokens)

    def take(self, ids: np.ndarray, source: int) -> int:
        length = min(len(ids), len(self.tokens) - self.used)
        self.tokens[self.used : self.used + length] = ids[:length]
        self.used += length
        self.lengths.append(length)
        self.sources.append(source)
        return length

    def close(self) -> Row:
        return Row(self.tokens, np.array(self.lengths, np.uint32), np.array(self.sources, np.uint8))
