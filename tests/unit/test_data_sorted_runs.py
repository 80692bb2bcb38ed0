"""Sorted runs and the shards packed from them: an external sort and a packing that equal the naive ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.corpus.shard_assembly import PackingSettings, pack_shard, packing_tasks
from pipeline.data.corpus.sorted_runs import NUM_BUCKETS, SortedRuns, SortedRunWriter
from pipeline.data.permutation import DOCUMENTS, permutation, sort_keys
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.reader import ShardReader

DTYPE = np.dtype("<u2")


def ignore(documents, tokens, size):
    pass


def write_runs(directory, keys, documents, tokens_per_run):
    """The documents by turns in two slices, each of several runs."""
    writers = [SortedRunWriter(directory, name, DTYPE, tokens_per_run) for name in ("slice-0", "slice-1")]
    for number, (key, (ids, source)) in enumerate(zip(keys, documents, strict=True)):
        writers[number % 2].add(key, ids, source)
    for writer in writers:
        writer.close()


def in_naive_order(keys, documents):
    return [documents[index] for index in sorted(range(len(keys)), key=lambda index: keys[index])]


def some_documents(lengths):
    ends = np.cumsum(lengths)
    return [
        (np.arange(end - length, end).astype(DTYPE), n % 3) for n, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]


# Keys at both ends of the range and on the edges of buckets among random ones.
KEYS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**48 - 1, 2**48, 2**63, 2**64 - 2**48, 2**64 - 1]))
BUCKETS = st.one_of(st.sampled_from([0, 1, 2**15, NUM_BUCKETS - 1, NUM_BUCKETS]), st.integers(0, NUM_BUCKETS))


@settings(max_examples=40)
@given(keys=st.lists(KEYS, min_size=1, max_size=25, unique=True), data=st.data())
def test_any_stretch_of_buckets_is_that_of_the_sorted_documents(tmp_path_factory, keys, data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(keys), max_size=len(keys)))
    first, last = sorted(data.draw(st.tuples(BUCKETS, BUCKETS)))
    documents, directory = some_documents(lengths), tmp_path_factory.mktemp("runs")
    write_runs(directory, keys, documents, tokens_per_run=20)
    runs = SortedRuns(directory, DTYPE)
    before = runs.tokens_before_bucket()
    assert before[first] == sum(length for key, length in zip(keys, lengths, strict=True) if key >> 48 < first)
    expected = [
        documents[index] for index in sorted(range(len(keys)), key=lambda i: keys[i]) if first <= keys[index] >> 48 < last
    ]
    if expected:
        found = runs.documents_in_buckets(first, last)
        pieces = zip(found.starts.tolist(), found.lengths.tolist(), found.sources.tolist(), strict=True)
        assert [(found.tokens[start : start + length].tolist(), source) for start, length, source in pieces] == [
            (ids.tolist(), source) for ids, source in expected
        ]


@pytest.mark.parametrize("lengths", [[5] * 200, [1, 300, 2, 90, 7] * 8, [1] * 64, [2000, 1]])
def test_shards_made_one_by_one_are_the_whole_sequence_packed_at_once(tmp_path, lengths):
    sequence_length, samples_per_shard = 16, 4
    documents = some_documents(lengths)
    keys = sort_keys(np.arange(len(lengths), dtype=np.uint64), DOCUMENTS, 3).tolist()
    write_runs(tmp_path / "runs", keys, documents, tokens_per_run=100)
    for folder in ("records", "data"):
        (tmp_path / folder).mkdir()
    packing_settings = PackingSettings(
        sorted_runs=tmp_path / "runs",
        records=tmp_path / "records",
        directory=tmp_path / "data",
        sequence_length=sequence_length,
        vocab_size=4000,
        end_of_document_id=0,
        num_sources=3,
        packing="concat",
        samples_per_shard=samples_per_shard,
    )
    # In the reverse order: none needs another.
    records = [pack_shard(work, ignore) for work in reversed(packing_tasks(packing_settings))][::-1]

    naive_tokens = [token for ids, _ in in_naive_order(keys, documents) for token in ids.tolist()]
    naive_document = [n for n, (ids, _) in enumerate(in_naive_order(keys, documents)) for _ in ids]
    naive_source = [source for ids, source in in_naive_order(keys, documents) for _ in ids]
    assert len(records) == -(-len(naive_tokens) // (sequence_length * samples_per_shard))
    manifest = Manifest(
        sequence_length=sequence_length,
        vocab_size=4000,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        sources=tuple({"name": name, "documents": 1, "tokens": 1} for name in "abc"),
        shards=tuple(record.shard for record in records),
    )
    reader, position, keys_read = ShardReader(tmp_path / "data", manifest), 0, []
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            row = reader.read(shard, sample)
            keys_read.append(row.key)
            used = int(row.lengths.sum())
            assert row.tokens[:used].tolist() == naive_tokens[position : position + used]
            lies_in = naive_document[position : position + used]
            assert row.lengths.tolist() == [lies_in.count(document) for document in dict.fromkeys(lies_in)]
            assert np.repeat(row.sources, row.lengths).tolist() == naive_source[position : position + used]
            position += used
            assert used == sequence_length or position == len(naive_tokens)
    assert position == len(naive_tokens)
    assert keys_read == [f"shard-{n // samples_per_shard:05d}/{n:09d}" for n in range(len(keys_read))]
    assert sum(record.num_documents for record in records) == len(lengths)
    assert np.sum([record.documents for record in records], axis=0).sum() == len(lengths)
    assert np.sum([record.tokens for record in records], axis=0).tolist() == [naive_source.count(n) for n in range(3)]


def test_sorting_by_key_is_the_permutation_of_that_name():
    keys = sort_keys(np.arange(1000, dtype=np.uint64), DOCUMENTS, 5)
    assert len(set(keys.tolist())) == 1000
    assert np.argsort(keys).tolist() == permutation(1000, DOCUMENTS, 5).tolist()
    part = sort_keys(np.arange(500, 600, dtype=np.uint64), DOCUMENTS, 5)
    assert part.tolist() == keys[500:600].tolist()
