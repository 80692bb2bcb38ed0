"""Packing shards: no key is in two shards of a folder."""

from random import Random

import pytest

from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import prepare
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.tokenizer import byte_tokenizer

T = 8


def keys_by_shard(directory):
    manifest = read_manifest(directory)
    reader = ShardReader(directory, manifest)
    return [
        [reader.read(shard, sample).key.partition("/")[2] for sample in range(entry.samples)]
        for shard, entry in enumerate(manifest.shards)
    ]


@pytest.mark.parametrize("samples_per_shard", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_no_key_is_in_two_shards_of_best_fit_however_long_a_document_and_however_badly_they_fit(
    tmp_path, seed, samples_per_shard
):
    draw = Random(seed)
    # A row holds one of the short ones and no second; a long one crosses several shards.
    lengths = [draw.choice([5, 5, 5, 5, 8, 31, 40, 73]) for _ in range(150)]
    documents = [Document("x" * (length - 1), "") for length in lengths]
    prepare(
        documents, tmp_path / "out", byte_tokenizer(), T, seed=seed, samples_per_shard=samples_per_shard, packing="best_fit"
    )
    by_shard = keys_by_shard(tmp_path / "out")
    keys = [key for shard in by_shard for key in shard]
    assert max(map(len, by_shard)) > 2 * samples_per_shard
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys)
