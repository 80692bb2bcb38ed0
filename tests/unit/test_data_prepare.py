"""Preparing: the same bytes every time, every token accounted for, whole or not at all; and its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import prepare
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.tokenizer import (
    END_OF_DOCUMENT,
    byte_tokenizer,
    end_of_document_id,
    fingerprint,
    for_documents,
    load_tokenizer,
    train_bpe,
    vocab_size,
)

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {n}: the {word} sat on the mat, {n * n} times. é€😀\r\n" for n in range(30) for word in ("cat", "dog")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 320)


def documents(source=""):
    return [Document(text, source) for text in TEXTS]


def read_documents(directory, tokenizer):
    """The texts, in their order in the shards, pieced together again over the rows' ends."""
    manifest = read_manifest(directory)
    reader = ShardReader(directory, manifest)
    ids = []
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            row = reader.read(shard, sample)
            ids += row.tokens[: row.lengths.sum()].tolist()
    texts, start = [], 0
    for end in [index for index, token in enumerate(ids) if token == end_of_document_id(tokenizer)]:
        texts.append(tokenizer.decode(ids[start:end]))
        start = end + 1
    assert start == len(ids)
    return texts


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_text_comes_back_shuffled_and_unchanged(tmp_path, tokenizer):
    manifest = prepare(documents(), tmp_path / "out", tokenizer, 16, seed=1, samples_per_shard=20)
    texts = read_documents(tmp_path / "out", tokenizer)
    assert texts != TEXTS
    assert sorted(texts) == sorted(TEXTS)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.num_tokens == sum(len(tokenizer.encode(text).ids) + 1 for text in TEXTS)
    assert manifest.num_samples == -(-manifest.num_tokens // 16)
    assert len(manifest.shards) == -(-manifest.num_samples // 20)
    assert manifest.sources == ()
    assert manifest.tokenizer_sha256 == fingerprint(load_tokenizer(tmp_path / "out" / manifest.tokenizer_file))


def test_the_same_input_and_seed_give_the_same_bytes(tmp_path, tokenizer):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(documents("web"), tmp_path / name, tokenizer, 16, seed=seed, source_names=["web"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_sources_are_counted_and_follow_their_documents(tmp_path, tokenizer):
    mixed = [Document(text, "even" if n % 2 == 0 else "odd") for n, text in enumerate(TEXTS)]
    manifest = prepare(mixed, tmp_path / "out", tokenizer, 64, seed=0, source_names=["odd", "even"])
    assert manifest.source_names == ("odd", "even")
    assert [source.documents for source in manifest.sources] == [30, 30]
    assert sum(source.tokens for source in manifest.sources) == manifest.num_tokens
    row = ShardReader(tmp_path / "out", manifest).read(0, 0)
    assert row.sources is not None
    ends = np.cumsum(row.lengths)
    for start, end, source in zip(ends - row.lengths, ends, row.sources, strict=True):
        text = tokenizer.decode(row.tokens[start:end].tolist())
        whole = next(document for document in mixed if document.text.startswith(text))
        assert manifest.source_names[source] == whole.source


def test_the_split_is_by_text_so_that_copies_stay_together(tmp_path, tokenizer):
    prepare(documents() + documents(), tmp_path / "out", tokenizer, 16, seed=0, validation_fraction=0.3)
    train = read_documents(tmp_path / "out" / "train", tokenizer)
    validation = read_documents(tmp_path / "out" / "validation", tokenizer)
    assert sorted(train + validation) == sorted(TEXTS * 2)
    assert not set(train) & set(validation)
    assert 8 < len(validation) / 2 < 28


def test_a_text_cannot_end_its_own_document(tmp_path, tokenizer):
    text = f"before {END_OF_DOCUMENT} after"
    prepare([Document(text, "")], tmp_path / "out", tokenizer, 64, seed=0)
    assert read_documents(tmp_path / "out", tokenizer) == [text]


def test_a_tokenizer_that_truncates_or_pads_does_neither_here(tmp_path, tokenizer):
    truncating = Tokenizer.from_str(tokenizer.to_str())
    truncating.enable_truncation(4)
    truncating.enable_padding(length=64)
    prepare([Document(TEXTS[0], "")], tmp_path / "out", truncating, 64, seed=0)
    assert read_documents(tmp_path / "out", tokenizer) == [TEXTS[0]]


def test_a_leftover_of_a_killed_run_is_made_again_and_a_failed_one_leaves_no_output(tmp_path, tokenizer):
    (tmp_path / "out.partial" / "shards").mkdir(parents=True)
    (tmp_path / "out.partial" / "lock").touch()

    def failing():
        yield Document("one", "")
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2"):
        prepare(failing(), tmp_path / "out", tokenizer, 16, seed=0)
    assert not (tmp_path / "out").exists()
    prepare(documents(), tmp_path / "out", tokenizer, 16, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (tmp_path / "out" / "shards").exists()


def test_an_output_that_exists_is_left_alone(tmp_path, tokenizer):
    prepare(documents(), tmp_path / "out", tokenizer, 16, seed=0)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        prepare(documents(), tmp_path / "out", tokenizer, 32, seed=0)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": []}, "no documents with text"),
        ({"documents": [Document("one", "")], "validation_fraction": 0.5}, "no documents with text for the .* split"),
        ({"validation_fraction": 1.0}, "fraction"),
        ({"sequence_length": 1}, "sequence length"),
        ({"samples_per_shard": 0}, "at least 1 sample"),
        ({"source_names": [str(n) for n in range(257)]}, "at most 256"),
    ],
)
def test_what_cannot_be_prepared_is_an_error(tmp_path, tokenizer, changes, message):
    arguments = {"documents": documents(), "sequence_length": 16, "seed": 0, **changes}
    with pytest.raises(DataError, match=message):
        prepare(output_dir=tmp_path / "out", tokenizer=tokenizer, **arguments)
    assert not (tmp_path / "out").exists()


def test_training_a_bpe_is_repeatable_and_covers_all_bytes(tokenizer):
    assert train_bpe(TEXTS, 320).to_str() == tokenizer.to_str()
    assert vocab_size(tokenizer) == 320
    assert end_of_document_id(tokenizer) == 0
    unseen = "".join(map(chr, range(1, 0x250))) + "漢字\x00"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen
    with pytest.raises(DataError, match="at least 257"):
        train_bpe(TEXTS, 256)


def test_a_fingerprint_is_of_the_tokens_and_not_of_the_file(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), indent=7))
    assert fingerprint(load_tokenizer(path)) == fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
    assert fingerprint(train_bpe(TEXTS, 319)) != fingerprint(tokenizer)


def test_end_of_document_has_other_names_elsewhere_and_must_have_one():
    assert end_of_document_id(Tokenizer(models.WordLevel({"a": 0, "</s>": 5}, unk_token="a"))) == 5
    assert vocab_size(Tokenizer(models.WordLevel({"a": 0, "</s>": 5}, unk_token="a"))) == 6
    with pytest.raises(DataError, match=r"no end-of-document token: expected one of <\|endoftext\|>"):
        end_of_document_id(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_the_byte_tokenizers_ids_are_the_bytes():
    tokenizer = byte_tokenizer()
    assert (vocab_size(tokenizer), end_of_document_id(tokenizer)) == (257, 256)
    every_byte = "".join(map(chr, range(0x250))) + "漢字😀 \r\n" + END_OF_DOCUMENT
    ids = for_documents(tokenizer).encode(every_byte).ids
    assert ids == list(every_byte.encode())
    assert tokenizer.decode(ids) == every_byte


def test_the_end_of_a_document_may_be_named():
    unusual = Tokenizer(models.WordLevel({"a": 0, "[END]": 1, "[STOP]": 2}, unk_token="a"))
    assert end_of_document_id(unusual, "[STOP]") == 2
    with pytest.raises(DataError, match=r"the tokenizer has no token '\[HALT\]' to end documents with"):
        end_of_document_id(unusual, "[HALT]")


def test_what_is_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def command_line(*arguments, cwd, script="prepare.py"):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_command_line_prepares_named_inputs_with_a_split(tmp_path):
    (tmp_path / "books").mkdir()
    for n, text in enumerate(TEXTS[:30]):
        (tmp_path / "books" / f"{n}.txt").write_text(text, newline="")
    lines = [json.dumps({"body": text}) for text in [*TEXTS[30:], " "]]
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    arguments = "--input prose=books --input web=web.jsonl --output out --train-bpe 300 --sequence-length 32 --text-field body"
    done = command_line(*arguments.split(), "--validation", "0.2", "--samples-per-shard", "50", "--seed", "5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "60 documents; 1 empty left out" in done.stdout
    train = read_manifest(tmp_path / "out" / "train")
    assert f"{train.num_tokens:,} tokens in {train.num_samples} rows of 32, {len(train.shards)} shard(s)" in done.stdout
    assert train.source_names == ("prose", "web")
    tokenizer = load_tokenizer(tmp_path / "out" / "train")
    texts = [text for name in ("train", "validation") for text in read_documents(tmp_path / "out" / name, tokenizer)]
    assert sorted(texts) == sorted(TEXTS)


def test_the_command_lines_of_parts_merge_verify_inspect_and_index_work_together(tmp_path):
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 40) + "{broken\n\n")
    (tmp_path / "model").mkdir()
    train_bpe(TEXTS, 320).save(str(tmp_path / "model" / "tokenizer.json"))
    arguments = ["--input", "web=web.jsonl", "--tokenizer", "model", "--sequence-length", "128", "--packing", "best_fit"]
    for part in ("1/2", "2/2"):
        done = command_line(*arguments, "--part", part, "--output", f"parts/{part[0]}", "--weight", "web=1.5", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "left out: web.jsonl, the line at byte 211,680: expected one JSON object a line" in done.stderr
    assert " documents; 1 undecodable left out" in done.stdout
    assert "packing best_fit: 0.00% of " in done.stdout
    assert ", weight 1.5" in done.stdout
    done = command_line("merge", "parts/1", "parts/2", "--output", "merged", script="shards.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "merged")
    assert manifest.preparation.input.documents == 2400
    assert 3500 < manifest.preparation.documents == manifest.sources[0].documents < 3700
    done = command_line("merge", "parts/1", "parts/1", "--output", "again", script="shards.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "missing: 2/2; there twice or not of it: 1/2, 1/2" in done.stderr
    done = command_line("verify", "merged", script="shards.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("merged: whole: ")
    done = command_line("inspect", "merged", "--rows", "1", script="shards.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "input: 2,400 documents; left out: 0 empty, 1 undecodable" in done.stdout
    assert "the cat sat on the mat" in done.stdout
    for path in (tmp_path / "merged").iterdir():
        if path.suffix in (".idx", ".crc32", ".json"):
            path.unlink()
    done = command_line("index", "merged", "--tokenizer", "model", "--source", "web", script="shards.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    indexed = read_manifest(tmp_path / "merged")
    assert (indexed.shards, indexed.sources) == (manifest.shards, manifest.sources)
    (tmp_path / "merged" / "shard-00001.tar").write_bytes(bytes(indexed.shards[1].bytes))
    done = command_line("verify", "merged", script="shards.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shard shard-00001: the sha256 of its tar is ")


def test_the_command_line_tells_what_to_mend_without_a_traceback(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"body": "x"}\n')
    arguments = ["--input", "web.jsonl", "--output", "out", "--train-bpe", "300", "--sequence-length", "32"]
    done = command_line(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: web.jsonl, line 1: no field 'text'")
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"web.jsonl"}
