"""The demo's corpus: a third of it noise, its validation text unseen, and the same on every run."""

import hashlib
import os
import shutil

import pytest

from pipeline.data.corpus.builtin import FOLDERS, prepare_builtin, standard_library_documents
from pipeline.data.errors import DataError
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.manifest import MANIFEST_FILE, read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.tokenizer import load_tokenizer

T = 128


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("builtin") / "corpus"
    prepare_builtin(directory, T, seed=0)
    return directory


def token_counts(directory):
    """Tokens of each source as they lie in the rows."""
    manifest = read_manifest(directory)
    reader = ShardReader(directory, manifest)
    counts = dict.fromkeys(manifest.source_names, 0)
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            row = reader.read(shard, sample)
            assert row.sources is not None
            for length, source in zip(row.lengths.tolist(), row.sources.tolist(), strict=True):
                counts[manifest.source_names[source]] += length
    return counts


def texts_of(directory):
    """The documents, pieced together again."""
    manifest = read_manifest(directory)
    reader, tokenizer = ShardReader(directory, manifest), load_tokenizer(directory)
    texts, ids = [], []
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            row = reader.read(shard, sample)
            for token in row.tokens[: row.lengths.sum()].tolist():
                ids.append(token)
                if token == manifest.end_of_document_id:
                    texts.append(tokenizer.decode(ids[:-1]))
                    ids = []
    return texts


def test_a_third_of_the_mix_is_noise(corpus):
    manifest = read_manifest(corpus / "mix")
    assert manifest.source_names == ("library", "noise")
    counts = token_counts(corpus / "mix")
    assert counts == {source.name: source.tokens for source in manifest.sources}
    assert 0.31 <= counts["noise"] / manifest.num_tokens <= 0.36
    assert 1_000_000 < manifest.num_tokens < 1_500_000


def test_the_library_of_the_mix_is_the_library_alone_and_validation_is_neither(corpus):
    library, mix = texts_of(corpus / "library"), texts_of(corpus / "mix")
    validation = texts_of(corpus / "validation")
    assert set(library) < set(mix)
    assert not set(validation) & set(mix)
    originals = {document.text for document in standard_library_documents()}
    assert set(library) | set(validation) <= originals
    assert len(set(mix) & originals) == len(library)
    assert read_manifest(corpus / "library").source_names == read_manifest(corpus / "validation").source_names
    assert 40_000 < read_manifest(corpus / "validation").num_tokens < 90_000


def test_all_three_have_the_one_tokenizer(corpus):
    manifests = [read_manifest(corpus / name) for name in FOLDERS]
    assert len({manifest.tokenizer_sha256 for manifest in manifests}) == 1
    assert {(manifest.vocab_size, manifest.sequence_length) for manifest in manifests} == {(4096, T)}


def test_noise_and_library_are_shuffled_together(corpus):
    stream = Stream(corpus / "mix", lanes=8, global_batch=8, micro_batch=8, rank=0, world_size=1, seed=0, shuffle_block=256)
    shares = [
        (batch.sources_BT == 1).sum().item() / batch.sources_BT.numel()
        for batch in stream.iterate(0, end_sample=stream.samples_per_epoch)
    ]
    quarter = len(shares) // 4
    for start in range(0, 4 * quarter, quarter):
        assert 0.2 < sum(shares[start : start + quarter]) / quarter < 0.47


def cpu_seconds() -> float:
    """Of this process and the ones that it waited for: what a busy machine does not change."""
    return sum(os.times()[:4])


def test_it_is_the_same_every_time_and_what_is_there_is_not_made_again(corpus, tmp_path):
    messages = []
    before = cpu_seconds()
    prepare_builtin(tmp_path / "again", T, seed=0, progress=messages.append)
    assert cpu_seconds() - before < 60, "5 s on an idle machine; this only catches an accident"
    assert any("mix" in message for message in messages)
    for path in corpus.rglob("*.*"):
        again = tmp_path / "again" / path.relative_to(corpus)
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    prepare_builtin(corpus, T, seed=0)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_a_corpus_of_other_sizes_or_not_whole_is_an_error(corpus, tmp_path):
    with pytest.raises(DataError, match=r"was made with sequence_length 128 \(expected 64\), seed 0 \(expected 7\); remove"):
        prepare_builtin(corpus, 64, seed=7)
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "else.txt").touch()
    with pytest.raises(DataError, match=r"expected the built-in corpus in .*, but it has no corpus.json; remove"):
        prepare_builtin(tmp_path / "something", T, seed=0)
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / "library" / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"manifest.json"):
        prepare_builtin(tmp_path / "copy", T, seed=0)
