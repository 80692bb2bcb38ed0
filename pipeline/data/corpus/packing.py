"""Packing: documents into rows of exactly T tokens, by one of two rules.

`concat` concatenates the documents and cuts the result into rows. Only the end of the last row is padding. A document that
crosses the end of a row continues in the next row as a document of its own. Attention and prediction stay within a row's
documents, so that its second chunk starts without context.

`best_fit` is best-fit-decreasing bin packing (arXiv 2404.10830). Only documents longer than a row are cut, into whole rows and
a rest. Every chunk, the longest first, goes to the row in which it leaves the least room. The price is some padding. Rows are
then permuted, because filled in this order, neighbouring rows would have chunks of similar lengths.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.permutation import ROWS, permutation
from pipeline.data.shards.writer import Row

PACKINGS = ("concat", "best_fit")


@dataclass(frozen=True)
class TokenizedDocuments:
    """D documents in order: document d is `tokens[starts[d] : starts[d] + lengths[d]]`, of source `sources[d]`.

    tokens: ids, of any integer type.
    starts, lengths: int64 [D]; no length is 0.
    sources: uint8 [D].
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray

    @staticmethod
    def join(documents: Iterable[tuple[np.ndarray, int]]) -> "TokenizedDocuments":
        """Concatenate documents, each given by its ids [n] and the index of its source."""
        ids, sources = zip(*documents, strict=True)
        lengths = np.array([len(part) for part in ids], np.int64)
        return TokenizedDocuments(np.concatenate(ids), np.cumsum(lengths) - lengths, lengths, np.array(sources, np.uint8))

    def select(self, which: np.ndarray) -> "TokenizedDocuments":
        """Select or reorder documents by index or mask."""
        return TokenizedDocuments(self.tokens, self.starts[which], self.lengths[which], self.sources[which])


@dataclass(frozen=True)
class _Chunks:
    """C chunks of documents in the order of the rows, int64 [C] each.

    documents: the document of each chunk.
    offsets: the position of its first token in the document.
    lengths: its tokens.
    row_ends: int64 [rows]; row r has the chunks [row_ends[r - 1], row_ends[r]), the first one from 0.
    """

    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    row_ends: np.ndarray


def pack(documents: TokenizedDocuments, sequence_length: int, *, padding_id: int, packing: str = "concat") -> Iterator[Row]:
    """Pack documents, at least one, into rows of `sequence_length` tokens.

    Args:
        documents: in the order to pack them.
        sequence_length: T.
        padding_id: token id of padding.
        packing: one of PACKINGS.

    Yields:
        Rows whose tokens have the dtype of the documents'.
    """
    # Divide the documents into chunks, and the chunks among rows.
    assert (documents.lengths > 0).all()
    chunks = {"concat": _concat, "best_fit": _best_fit}[packing](documents.lengths, sequence_length)
    starts = (documents.starts[chunks.documents] + chunks.offsets).tolist()
    ends = (documents.starts[chunks.documents] + chunks.offsets + chunks.lengths).tolist()
    lengths, sources = chunks.lengths.astype(np.uint32), documents.sources[chunks.documents]

    # Copy the tokens of each row.
    first = 0
    for last in chunks.row_ends.tolist():
        tokens = np.full(sequence_length, padding_id, documents.tokens.dtype)
        filled = np.concatenate([documents.tokens[starts[chunk] : ends[chunk]] for chunk in range(first, last)])
        tokens[: len(filled)] = filled
        yield Row(tokens, lengths[first:last], sources[first:last])
        first = last


def _concat(lengths: np.ndarray, sequence_length: int) -> _Chunks:
    # Positions are in the concatenation. A chunk ends where a document or a row does.
    document_ends = np.cumsum(lengths)
    row_starts = np.arange(0, document_ends[-1], sequence_length)
    chunk_ends = np.union1d(document_ends, row_starts[1:])
    chunk_starts = np.concatenate([[0], chunk_ends[:-1]])
    documents = np.searchsorted(document_ends, chunk_starts, side="right")
    return _Chunks(
        documents=documents,
        offsets=chunk_starts - (document_ends - lengths)[documents],
        lengths=chunk_ends - chunk_starts,
        row_ends=np.append(np.searchsorted(chunk_starts, row_starts[1:]), len(chunk_starts)),
    )


def _best_fit(lengths: np.ndarray, sequence_length: int) -> _Chunks:
    documents, offsets, chunk_lengths = _cut(lengths, sequence_length)
    rows = _best_fitting_rows(chunk_lengths, sequence_length)
    num_rows = int(rows.max()) + 1
    # Permute the rows, which were filled in the order of chunk lengths.
    position = np.argsort(permutation(num_rows, ROWS))[rows]
    order = np.argsort(position, kind="stable")
    row_ends = np.cumsum(np.bincount(position, minlength=num_rows))
    return _Chunks(documents[order], offsets[order], chunk_lengths[order], row_ends)


def _cut(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut only documents longer than a row; returns the document, offset and length of each chunk, int64 [C] each."""
    num_chunks = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), num_chunks)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    offsets = number * sequence_length
    return documents, offsets, np.minimum(lengths[documents] - offsets, sequence_length)


def _best_fitting_rows(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Assign each chunk to a row by best-fit-decreasing: int64 [C]."""
    rows = np.empty(len(lengths), np.int64)
    num_rows = 0
    free_sizes: list[int] = []  # the distinct numbers of free tokens of rows, sorted
    rows_by_free: dict[int, list[int]] = defaultdict(list)  # rows by their number of free tokens
    longest_first = np.argsort(-lengths, kind="stable")
    for chunk, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        # The fullest row that has room, or a new one.
        slot = bisect_left(free_sizes, length)
        if slot == len(free_sizes):
            row, free = num_rows, sequence_length
            num_rows += 1
        else:
            free = free_sizes[slot]
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                del free_sizes[slot]

        rows[chunk] = row
        if remaining := free - length:
            if not rows_by_free[remaining]:
                insort(free_sizes, remaining)
            rows_by_free[remaining].append(row)
    return rows
