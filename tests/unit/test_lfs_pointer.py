"""A pointer of Git LFS in place of a file is one message that says how to fetch the file, wherever a file is read."""

import shutil

import pytest

from pipeline.data.corpus.inputs import Input
from pipeline.data.corpus.prepare import PrepareSettings
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.errors import DataError
from pipeline.data.shards.adoption import index
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.verification import verify
from pipeline.data.special_tokens import special_tokens
from pipeline.data.tokenizer import byte_tokenizer, load_tokenizer
from pipeline.model.huggingface import read_model_settings
from pipeline.model.model_config import ModelFilesError
from pipeline.model.weight_files import weight_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"
ADVICE = "is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull`"


def prepared(folder):
    (folder / "a.txt").write_text("text " * 20)
    prepare_files([Input("", str(folder / "a.txt"))], folder / "data", byte_tokenizer(), PrepareSettings(16))
    return folder / "data"


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.tar", "shard-00000.tar.idx", "shard-00000.tar.crc32"])
def test_a_pointer_among_prepared_shards_is_named(tmp_path, name):
    data = prepared(tmp_path)
    (data / name).write_text(POINTER)
    with pytest.raises(DataError) as caught:
        read_manifest(data)
    assert str(caught.value) == f"{data / name} {ADVICE}"
    if name != "manifest.json":
        assert verify(data) == [f"{data / name} {ADVICE}"]


def test_a_pointer_in_place_of_a_tokenizer_or_of_a_tar_to_adopt_is_named(tmp_path):
    data = prepared(tmp_path)
    (data / "manifest.json").unlink()
    (data / "shard-00000.tar").write_text(POINTER)
    with pytest.raises(DataError, match=f"shard-00000.tar {ADVICE}"):
        index(data, byte_tokenizer())
    (data / "tokenizer_config.json").write_text(POINTER)
    with pytest.raises(DataError, match=f"tokenizer_config.json {ADVICE}"):
        special_tokens(byte_tokenizer(), data)
    (data / "tokenizer.json").write_text(POINTER)
    with pytest.raises(DataError, match=f"tokenizer.json {ADVICE}"):
        load_tokenizer(data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pointer_in_place_of_a_models_file_is_named(tmp_path, tiny_reference, name):
    model = shutil.copytree(tiny_reference, tmp_path / "model")
    (model / name).write_text(POINTER)
    with pytest.raises(ModelFilesError, match=f"{name} {ADVICE}"):
        read_model_settings(model) if name == "config.json" else weight_files(model)
