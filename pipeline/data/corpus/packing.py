"""Packing: documents into rows of exactly T tokens, by one of two rules.

`concat` lays documents one after the other and cuts rows from them. No token is padding but at the end of the last row. A
document that crosses the end of a row continues in the next one as a document of its own: attention and prediction stay
within a row's documents, so its second piece starts without context.

`best_fit` is best-fit-decreasing (arXiv 2404.10830): only documents longer than a row are cut, into whole rows and a rest, and
every piece, the longest first, goes to the row in which it leaves the least room. It costs some padding. Rows and the pieces in
them are put back in an order that has nothing to do with length.
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
    """Documents in their order: number d is `tokens[starts[d] : starts[d] + lengths[d]]`, of source `sources[d]`.

    `tokens` of any integer type, `starts` and `lengths` int64 (no length is 0), `sources` uint8.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray

    @staticmethod
    def join(documents: Iterable[tuple[np.ndarray, int]]) -> "TokenizedDocuments":
        """Put documents, each its ids [n] and the index of its source, one after the other."""
        ids, sources = zip(*documents, strict=True)
        lengths = np.array([len(part) for part in ids], np.int64)
        return TokenizedDocuments(np.concatenate(ids), np.cumsum(lengths) - lengths, lengths, np.array(sources, np.uint8))

    def select(self, which: np.ndarray) -> "TokenizedDocuments":
        """Some of them, or another order, by index or mask."""
        return TokenizedDocuments(self.tokens, self.starts[which], self.lengths[which], self.sources[which])


@dataclass(frozen=True)
class _Pieces:
    """Pieces of documents in the order of the rows: of which document, from which of its tokens on, how many; int64 [P].

    Row r has the pieces from `row_ends[r - 1]` (0 for the first) to `row_ends[r]`.
    """

    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    row_ends: np.ndarray


def pack(documents: TokenizedDocuments, sequence_length: int, *, padding_id: int, packing: str = "concat") -> Iterator[Row]:
    """Pack documents, at least one, into rows of `sequence_length` tokens; a row's tokens have the type of the documents'."""
    assert (documents.lengths > 0).all()
    pieces = {"concat": _concat, "best_fit": _best_fit}[packing](documents.lengths, sequence_length)
    starts = (documents.starts[pieces.documents] + pieces.offsets).tolist()
    ends = (documents.starts[pieces.documents] + pieces.offsets + pieces.lengths).tolist()
    lengths, sources = pieces.lengths.astype(np.uint32), documents.sources[pieces.documents]
    first = 0
    for last in pieces.row_ends.tolist():
        tokens = np.full(sequence_length, padding_id, documents.tokens.dtype)
        filled = np.concatenate([documents.tokens[starts[piece] : ends[piece]] for piece in range(first, last)])
        tokens[: len(filled)] = filled
        yield Row(tokens, lengths[first:last], sources[first:last])
        first = last


def _concat(lengths: np.ndarray, sequence_length: int) -> _Pieces:
    document_ends = np.cumsum(lengths)
    row_starts = np.arange(0, document_ends[-1], sequence_length)
    piece_ends = np.union1d(document_ends, row_starts[1:])
    piece_starts = np.concatenate([[0], piece_ends[:-1]])
    documents = np.searchsorted(document_ends, piece_starts, side="right")
    return _Pieces(
        documents=documents,
        offsets=piece_starts - (document_ends - lengths)[documents],
        lengths=piece_ends - piece_starts,
        row_ends=np.append(np.searchsorted(piece_starts, row_starts[1:]), len(piece_starts)),
    )


def _best_fit(lengths: np.ndarray, sequence_length: int) -> _Pieces:
    documents, offsets, piece_lengths = _cut(lengths, sequence_length)
    rows = _best_fitting_rows(piece_lengths, sequence_length)
    num_rows = int(rows.max()) + 1
    # By length, as they were filled, neighbours would be alike.
    place = np.argsort(permutation(num_rows, ROWS))[rows]
    order = np.argsort(place, kind="stable")
    row_ends = np.cumsum(np.bincount(place, minlength=num_rows))
    return _Pieces(documents[order], offsets[order], piece_lengths[order], row_ends)


def _cut(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of which document, from where on, and how long every piece is, if only what is longer than a row is cut."""
    num_pieces = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), num_pieces)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    offsets = number * sequence_length
    return documents, offsets, np.minimum(lengths[documents] - offsets, sequence_length)


def _best_fitting_rows(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """The row of each piece, int64 [P], by best-fit-decreasing."""
    rows = np.empty(len(lengths), np.int64)
    num_rows = 0
    room: list[int] = []  # the different numbers of free tokens, sorted
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by their free tokens
    longest_first = np.argsort(-lengths, kind="stable")
    for piece, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        place = bisect_left(room, length)
        if place == len(room):
            row, free = num_rows, sequence_length
            num_rows += 1
        else:
            free = room[place]
            row = with_room[free].pop()
            if not with_room[free]:
                del room[place]
        rows[piece] = row
        if left := free - length:
            if not with_room[left]:
                insort(room, left)
            with_room[left].append(row)
    return rows
