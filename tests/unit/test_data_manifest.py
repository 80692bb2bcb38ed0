"""The manifest comes back as written, and every way to get a folder wrong has its message."""

import json
import os

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest, Source, read_manifest, write_manifest
from pipeline.data.shards.writer import Row, write_shards


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    row = Row(np.arange(4, dtype=np.uint32), np.array([3], np.uint32), np.array([0], np.uint8))
    shards = write_shards([row] * 5, directory, vocab_size=10, samples_per_shard=3, named_sources=True)
    manifest = Manifest(
        sequence_length=4,
        vocab_size=10,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="a" * 64,
        sources=(Source(name="prose", documents=5, tokens=15),),
        shards=tuple(shards),
    )
    write_manifest(directory, manifest)
    (directory / manifest.tokenizer_file).touch()
    return directory


def edit(folder, **changes):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_comes_back_as_it_was_written(folder):
    manifest = read_manifest(folder)
    assert (manifest.num_samples, manifest.num_tokens, manifest.source_names) == (5, 15, ("prose",))
    assert [shard.name for shard in manifest.shards] == ["shard-00000", "shard-00001"]
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert {path.name for path in folder.iterdir() if "shard" not in path.name} == {MANIFEST_FILE, "tokenizer.json"}


def test_a_manifest_gets_its_name_when_it_is_on_the_disk_and_leaves_nothing_if_it_cannot_be(folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = (folder / MANIFEST_FILE).read_bytes()
    names = sorted(folder.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, read_manifest(folder).model_copy(update={"end_of_document_id": 7}))
    assert (folder / MANIFEST_FILE).read_bytes() == before
    assert sorted(folder.iterdir()) == names


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json cannot be found, but manifest.json names it as the data's tokenizer"):
        read_manifest(folder)


def test_the_keys_of_the_json_are_the_documented_ones(folder):
    record = json.loads((folder / MANIFEST_FILE).read_text())
    assert list(record) == [
        "format_version",
        "sequence_length",
        "vocab_size",
        "end_of_document_id",
        "tokenizer_file",
        "tokenizer_sha256",
        "sources",
        "shards",
    ]
    assert list(record["shards"][0]) == ["name", "samples", "tokens", "bytes", "sha256", "crc32"]
    assert list(record["sources"][0]) == ["name", "documents", "tokens"]


def test_a_missing_folder_an_empty_one_and_one_without_manifest_are_told_apart(tmp_path, folder):
    with pytest.raises(DataError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder is empty"):
        read_manifest(tmp_path / "empty")
    with pytest.raises(DataError, match=r"it has none; did you mean .*data\?"):
        read_manifest(tmp_path)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"expected manifest.json in .*prepare.py"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, but this program reads version 1"),
        ({"format_version": "1"}, "format_version"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"end_of_document_id": 10}, "is not below vocab_size"),
        ({"colour": "red"}, "colour"),
        ({"shards": []}, "lists no samples"),
        ({"tokenizer_file": "../../secret"}, "tokenizer_file"),
        ({"sequence_length": 2**62}, "sequence_length"),
        ({"sources": [{"name": "a", "documents": 1, "tokens": 1}] * 2}, "two sources have the same name"),
    ],
)
def test_a_wrong_manifest_is_an_error_that_says_what_is_wrong(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize(
    "changes", [{"samples": 2**32}, {"samples": 2**70}, {"tokens": 2**42}, {"tokens": 2**63}, {"bytes": 2**64}, {"bytes": 0}]
)
def test_numbers_that_no_shard_can_have_are_an_error(folder, changes):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["shards"][1] |= changes
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"not a valid manifest: shards.*{next(iter(changes))}"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', "[" * 200_000])
def test_half_a_manifest_is_an_error(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(DataError, match="not a valid manifest"):
        read_manifest(folder)


def test_a_manifest_that_is_no_text_is_an_error(folder):
    (folder / MANIFEST_FILE).write_bytes(b'{"format_version": 1, "\xff')
    with pytest.raises(DataError, match=r"manifest.json is not a valid manifest: .*utf-8"):
        read_manifest(folder)


def test_a_shard_name_cannot_point_outside_the_folder(folder):
    shards = json.loads((folder / MANIFEST_FILE).read_text())["shards"]
    shards[0]["name"] = "../data/shard-00000"
    edit(folder, shards=shards)
    with pytest.raises(DataError, match=r"shards.0.name"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.tar.idx", "shard-00001.tar.crc32"])
def test_a_missing_or_cut_file_is_an_error_that_names_it(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(DataError, match=f"{name} has {len(data) - 1} bytes, expected {len(data)}"):
        read_manifest(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} cannot be found"):
        read_manifest(folder)
