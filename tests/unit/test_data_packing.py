"""Packing loses no token, makes none up, says which documents lie where, and cuts as seldom as its rule allows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.corpus.packing import PACKINGS, TokenizedDocuments, pack

PADDING = 7


def documents_of(lengths):
    """Documents of these lengths whose tokens are all different, from three sources in turn."""
    starts = np.cumsum([0, *lengths])
    return [
        (np.arange(start, start + length) + 10, n % 3) for n, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


def packed(documents, sequence_length, packing="concat"):
    return list(pack(TokenizedDocuments.join(documents), sequence_length, padding_id=PADDING, packing=packing))


def pieces_of(rows):
    """(ids, source) of every document piece, in order."""
    for row in rows:
        ends = np.cumsum(row.lengths.astype(int))
        for start, end, source in zip(ends - row.lengths, ends, row.sources, strict=True):
            yield row.tokens[start:end].tolist(), int(source)


def test_a_document_that_crosses_the_end_of_a_row_goes_on_in_the_next_as_a_new_one():
    rows = packed([(np.array([1, 2, 3], np.uint16), 0), (np.array([4, 5, 6], np.uint16), 1)], 4)
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, PADDING, PADDING]]
    assert [row.lengths.tolist() for row in rows] == [[3, 1], [2]]
    assert [row.sources.tolist() for row in rows] == [[0, 1], [1]]
    assert {row.tokens.dtype for row in rows} == {np.dtype(np.uint16)}
    assert {row.lengths.dtype for row in rows} == {np.dtype(np.uint32)}
    assert {row.sources.dtype for row in rows} == {np.dtype(np.uint8)}


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), sequence_length=st.integers(1, 9))
def test_concat_keeps_the_order_and_pads_only_the_end_of_the_last_row(lengths, sequence_length):
    documents = documents_of(lengths)
    rows = packed(documents, sequence_length)
    assert [token for ids, _ in pieces_of(rows) for token in ids] == [token for ids, _ in documents for token in ids.tolist()]
    assert all(row.lengths.sum() == sequence_length for row in rows[:-1])
    # The naive rule: a piece ends where its document does or its row does, and nowhere else.
    ends = set(np.cumsum(lengths)) | set(range(0, sum(lengths), sequence_length))
    assert np.cumsum([len(ids) for ids, _ in pieces_of(rows)]).tolist() == sorted(ends - {0})


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    sequence_length=st.integers(1, 9),
    packing=st.sampled_from(PACKINGS),
)
def test_every_token_is_there_once_with_its_source_and_the_rest_is_padding(lengths, sequence_length, packing):
    documents = documents_of(lengths)
    rows = packed(documents, sequence_length, packing)
    source_of = {token: source for ids, source in documents for token in ids.tolist()}
    pieces = list(pieces_of(rows))
    assert sorted(token for ids, _ in pieces for token in ids) == sorted(source_of)
    starts = np.cumsum([0, *lengths])
    for ids, source in pieces:
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert {source_of[token] for token in ids} == {source}
        assert not {start for start in starts if ids[0] - 10 < start <= ids[-1] - 10}
    for row in rows:
        assert len(row.tokens) == sequence_length
        assert 0 < row.lengths.sum() <= sequence_length
        assert (row.tokens[row.lengths.sum() :] == PADDING).all()


def naive_best_fit_decreasing(lengths, sequence_length):
    """How full the rows are, sorted."""
    pieces = [sequence_length for length in lengths for _ in range(length // sequence_length)]
    pieces += [length % sequence_length for length in lengths if length % sequence_length]
    rows = []
    for piece in sorted(pieces, reverse=True):
        fitting = [index for index, row in enumerate(rows) if row + piece <= sequence_length]
        if fitting:
            rows[max(fitting, key=lambda index: rows[index])] += piece
        else:
            rows.append(piece)
    return sorted(rows)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), sequence_length=st.integers(1, 20))
def test_best_fit_is_best_fit_decreasing_and_cuts_only_what_is_longer_than_a_row(lengths, sequence_length):
    rows = packed(documents_of(lengths), sequence_length, "best_fit")
    assert sorted(int(row.lengths.sum()) for row in rows) == naive_best_fit_decreasing(lengths, sequence_length)
    assert len(list(pieces_of(rows))) == sum(-(-length // sequence_length) for length in lengths)


def test_best_fit_does_not_leave_the_rows_in_the_order_of_length():
    lengths = np.random.default_rng(0).integers(1, 64, 2000).tolist()
    rows = packed(documents_of(lengths), 64, "best_fit")
    longest = np.array([row.lengths.max() for row in rows])
    halves = longest[: len(rows) // 2].mean(), longest[len(rows) // 2 :].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.1)
    first_pieces = np.mean([row.lengths[0] for row in rows if len(row.lengths) > 1])
    last_pieces = np.mean([row.lengths[-1] for row in rows if len(row.lengths) > 1])
    assert first_pieces == pytest.approx(last_pieces, rel=0.2)
