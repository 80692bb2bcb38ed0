"""Packing loses no token, makes none up, and says which documents lie where."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.packing import pack

PADDING = 7


def pieces_of(rows):
    """(ids, source) of every document piece, in order."""
    for row in rows:
        ends = np.cumsum(row.lengths.astype(int))
        for start, end, source in zip(ends - row.lengths, ends, row.sources, strict=True):
            yield row.tokens[start:end].tolist(), int(source)


def test_a_document_that_crosses_the_end_of_a_row_goes_on_in_the_next_as_a_new_one():
    rows = list(pack([(np.array([1, 2, 3]), 0), (np.array([4, 5, 6]), 1)], 4, padding_id=PADDING))
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, PADDING, PADDING]]
    assert [row.lengths.tolist() for row in rows] == [[3, 1], [2]]
    assert [row.sources.tolist() for row in rows] == [[0, 1], [1]]
    assert {row.tokens.dtype for row in rows} == {np.dtype(np.uint32)}
    assert {row.lengths.dtype for row in rows} == {np.dtype(np.uint32)}
    assert {row.sources.dtype for row in rows} == {np.dtype(np.uint8)}


@given(lengths=st.lists(st.integers(1, 20), max_size=12), sequence_length=st.integers(1, 9))
def test_no_token_is_lost_and_only_the_end_of_the_last_row_is_padding(lengths, sequence_length):
    starts = np.cumsum([0, *lengths])
    documents = [
        (np.arange(start, start + length) + 10, index % 3)
        for index, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]
    rows = list(pack(documents, sequence_length, padding_id=PADDING))
    pieces = list(pieces_of(rows))
    assert [token for ids, _ in pieces for token in ids] == [token for ids, _ in documents for token in ids.tolist()]
    source_of = {token: source for ids, source in documents for token in ids.tolist()}
    assert all(source_of[token] == source for ids, source in pieces for token in ids)
    assert all(len({t for t in starts if ids[0] - 10 < t <= ids[-1] - 10}) == 0 for ids, _ in pieces)
    assert all(len(row.tokens) == sequence_length for row in rows)
    assert all(row.lengths.sum() == sequence_length for row in rows[:-1])
    for row in rows[-1:]:
        assert row.lengths.sum() > 0
        assert (row.tokens[row.lengths.sum() :] == PADDING).all()
