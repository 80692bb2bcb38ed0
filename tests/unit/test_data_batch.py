"""What each head has to predict, against loops written by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.loading.batch import blank_batch, collate, targets_and_valid
from pipeline.data.shards.sample import Sample
from tests.rows import batch_of


def by_hand(tokens, document_ids, num_heads):
    rows, length = len(tokens), len(tokens[0])
    targets = [[[0] * num_heads for _ in range(length)] for _ in range(rows)]
    valid = [[[False] * num_heads for _ in range(length)] for _ in range(rows)]
    for b in range(rows):
        for t in range(length):
            for h in range(num_heads):
                j = t + 1 + h
                if j < length and document_ids[b][t] >= 0 and document_ids[b][j] == document_ids[b][t]:
                    targets[b][t][h] = tokens[b][j]
                    valid[b][t][h] = True
    return targets, valid


def document_ids_of(lengths, sequence_length):
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return ids + [-1] * (sequence_length - len(ids))


def test_a_head_predicts_the_token_ahead_within_its_document_and_never_padding():
    tokens_BT = torch.tensor([[11, 12, 13, 21, 22, 0, 0]])
    document_ids_BT = torch.tensor([[0, 0, 0, 1, 1, -1, -1]], dtype=torch.int32)
    targets_BTH, valid_BTH = targets_and_valid(tokens_BT, document_ids_BT, 2)
    assert targets_BTH.dtype == torch.int64
    assert valid_BTH.dtype == torch.bool
    assert valid_BTH[0].tolist() == [
        [True, True],
        [True, False],
        [False, False],
        [True, False],
        [False, False],
        [False, False],
        [False, False],
    ]
    assert targets_BTH[0].tolist() == [[12, 13], [13, 0], [0, 0], [22, 0], [0, 0], [0, 0], [0, 0]]


@given(
    rows=st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    num_heads=st.integers(1, 6),
)
def test_targets_and_valid_pairs_equal_those_found_by_hand(rows, extra, num_heads):
    sequence_length = max(1, max(map(sum, rows)) + extra)
    document_ids = [document_ids_of(lengths, sequence_length) for lengths in rows]
    tokens = [[100 * b + t for t in range(sequence_length)] for b in range(len(rows))]
    targets_BTH, valid_BTH = targets_and_valid(torch.tensor(tokens), torch.tensor(document_ids), num_heads)
    expected_targets, expected_valid = by_hand(tokens, document_ids, num_heads)
    assert targets_BTH.tolist() == expected_targets
    assert valid_BTH.tolist() == expected_valid


def sample(key, lengths, sources, sequence_length=6):
    return Sample(
        key=key,
        tokens=np.arange(sequence_length, dtype=np.uint16) + 65530,
        lengths=np.array(lengths, np.uint32),
        sources=None if sources is None else np.array(sources, np.uint8),
    )


def test_collating_numbers_documents_marks_padding_and_keeps_sources():
    batch = collate([sample("s/0", [2, 1], [1, 0]), sample("s/1", [6], [3])])
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.tokens_BT[0].tolist() == [65530, 65531, 65532, 65533, 65534, 65535]
    assert batch.document_ids_BT.dtype == torch.int32
    assert batch.document_ids_BT.tolist() == [[0, 0, 1, -1, -1, -1], [0] * 6]
    assert batch.sources_BT.dtype == torch.int64
    assert batch.sources_BT.tolist() == [[1, 1, 0, 0, 0, 0], [3] * 6]
    assert batch.keys == ("s/0", "s/1")


def test_without_named_sources_every_source_is_zero():
    assert collate([sample("s/0", [2, 1], None)]).sources_BT.tolist() == [[0] * 6]


@pytest.mark.parametrize("non_blocking", [True, False])
def test_a_batch_moves_as_a_whole(non_blocking):
    batch = collate([sample("s/0", [2, 1], None)]).to("meta", non_blocking=non_blocking)
    devices = {tensor.device.type for tensor in (batch.tokens_BT, batch.document_ids_BT, batch.sources_BT)}
    assert devices == {"meta"}
    assert batch.keys == ("s/0",)


@given(
    rows=st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    num_heads=st.integers(1, 5),
)
def test_the_host_knows_spans_and_valid_pairs_as_the_tensors_have_them(rows, extra, num_heads):
    sequence_length = max(1, max(map(sum, rows)) + extra)
    batch = batch_of(rows, sequence_length, vocab_size=9)
    starts, longest = batch.spans
    assert starts.dtype == torch.int32
    places = [(row, document) for row, ids in enumerate(batch.document_ids_BT.tolist()) for document in ids]
    runs = [len(list(same)) for _, same in itertools.groupby(places)]
    assert starts.tolist() == [0, *itertools.accumulate(runs)]
    assert longest == max(runs)
    _, valid_BTH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, num_heads)
    assert batch.num_valid(num_heads).tolist() == valid_BTH.sum(1).tolist()


def test_rows_that_do_not_come_have_spans_and_no_valid_pairs():
    batch = blank_batch(2, 5, "gone")
    assert (batch.spans.starts_S.tolist(), batch.spans.longest) == ([0, 5, 10], 5)
    assert batch.num_valid(3).tolist() == [[0, 0, 0]] * 2


def test_all_tensors_move_together():
    batch = batch_of([[3, 2], [4]], 6, vocab_size=9)
    moved = batch.to("meta")
    assert len(moved.tensors) == len(batch.tensors) == 4
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert torch.equal(moved.num_valid(2), batch.num_valid(2))
