"""Foreign shards: what webdataset's own writer wrote is adopted as it is, and nothing else gets in."""

import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.data.errors import DataError
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.adoption import index
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.output_folder import locked
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.verification import verify
from pipeline.data.tokenizer import END_OF_DOCUMENT, byte_tokenizer, end_of_document_id
from tests.unit.test_data_damage import sparse_member

T = 16
TOKENIZER = byte_tokenizer()
END = end_of_document_id(TOKENIZER)


def rows(count, named=True):
    for number in range(count):
        text = f"row {number:03d}".encode()
        tokens = np.array([*text, END, *text[:3], *[0] * (T - len(text) - 4)], np.uint16)
        sample = {"tokens.npy": tokens, "documents.npy": np.array([len(text) + 1, 3], np.uint32)}
        if named:
            sample["sources.npy"] = np.array([number % 3, 0], np.uint8)
        yield {"__key__": f"key{number:03d}", **sample}


def write_shards(directory, samples, **options):
    from webdataset.writer import ShardWriter

    directory.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ShardWriter(str(directory / "their-%03d.tar"), maxcount=5, verbose=0, **options) as writer:
            for sample in samples:
                writer.write(sample)
    return directory


@pytest.mark.parametrize("form", ["USTAR_FORMAT", "PAX_FORMAT", "GNU_FORMAT"])
def test_shards_of_webdatasets_own_writer_are_adopted_and_read_for_training(tmp_path, form):
    directory = write_shards(tmp_path / "data", rows(12), format=form)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = index(directory, TOKENIZER)
    assert manifest == read_manifest(directory)
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("their-000", 5), ("their-001", 5), ("their-002", 2)]
    assert (manifest.sequence_length, manifest.vocab_size, manifest.end_of_document_id) == (T, 257, 256)
    assert manifest.num_tokens == 12 * 11
    assert manifest.source_names == ("source-0", "source-1", "source-2")
    assert [source.tokens for source in manifest.sources] == [4 * 8 + 12 * 3, 4 * 8, 4 * 8]
    assert [source.documents for source in manifest.sources] == [4, 4, 4]
    assert verify(directory) == []
    expected = {sample["__key__"]: sample["tokens.npy"].tolist() for sample in rows(12)}
    reader = ShardReader(directory, manifest)
    read = [reader.read(shard, sample) for shard, entry in enumerate(manifest.shards) for sample in range(entry.samples)]
    assert {sample.key.partition("/")[2]: sample.tokens.tolist() for sample in read} == expected
    stream = Stream(directory, lanes=4, global_batch=4, micro_batch=4, rank=0, world_size=1, seed=0, shuffle_block=4)
    batches = list(stream.iterate(0, end_sample=12))
    assert sum(len(batch.tokens_BT) for batch in batches) == 12


def test_foreign_shards_that_were_exchanged_with_their_index_files_are_noticed(tmp_path):
    directory = write_shards(tmp_path / "data", rows(10))
    manifest = index(directory, TOKENIZER)
    for suffix in ("tar", "tar.idx", "tar.crc32"):
        one, other = (directory / f"their-00{number}.{suffix}" for number in (0, 1))
        assert one.stat().st_size == other.stat().st_size
        one.rename(tmp_path / "spare")
        other.rename(one)
        (tmp_path / "spare").rename(other)
    with pytest.raises(DataError, match=r"^shard their-001, sample 2, .* the shard was exchanged for another"):
        ShardReader(directory, manifest).read(1, 2)


def test_sources_may_be_named_and_must_be_enough(tmp_path):
    directory = write_shards(tmp_path / "data", rows(7))
    with pytest.raises(DataError, match="source 2, but the manifest names 2"):
        index(directory, TOKENIZER, source_names=["prose", "web"])
    assert sorted(path.suffix for path in directory.iterdir()) == [".tar", ".tar"]
    named = index(directory, TOKENIZER, source_names=["prose", "web", "code", "none"])
    assert [(source.name, source.documents) for source in named.sources] == [("prose", 3), ("web", 2), ("code", 2), ("none", 0)]


def test_shards_without_sources_have_none(tmp_path):
    directory = write_shards(tmp_path / "data", rows(6, named=False))
    with pytest.raises(DataError, match=r"the samples have no sources\.npy"):
        index(directory, TOKENIZER, source_names=["prose"])
    assert index(directory, TOKENIZER).sources == ()


def test_what_is_adopted_already_and_what_holds_no_shards_is_an_error(tmp_path):
    directory = write_shards(tmp_path / "data", rows(3))
    index(directory, TOKENIZER)
    with pytest.raises(DataError, match=r"is there already; .*verify"):
        index(directory, TOKENIZER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected shards, \*\.tar"):
        index(tmp_path / "empty", TOKENIZER)


def test_a_tar_that_is_there_under_two_names_is_refused(tmp_path):
    directory = write_shards(tmp_path / "data", rows(10))
    shutil.copy(directory / "their-001.tar", directory / "their-007.tar")
    with pytest.raises(DataError, match=r"their-007\.tar is the same file as their-001\.tar: its rows would come twice"):
        index(directory, TOKENIZER)
    assert sorted(path.name for path in directory.iterdir()) == ["their-000.tar", "their-001.tar", "their-007.tar"]


def test_who_adopts_shards_while_another_does_is_refused_and_harms_nothing(tmp_path):
    directory = write_shards(tmp_path / "data", rows(3))
    (directory / "their-000.tar.idx.17.tmp").write_bytes(b"half")
    with locked(directory, ".index.lock"), pytest.raises(DataError, match=r"another process is writing to .*data; wait"):
        index(directory, TOKENIZER)
    assert sorted(path.name for path in directory.iterdir()) == [".index.lock", "their-000.tar", "their-000.tar.idx.17.tmp"]
    index(directory, TOKENIZER)
    names = ["manifest.json", "their-000.tar", "their-000.tar.crc32", "their-000.tar.idx", "tokenizer.json"]
    assert sorted(path.name for path in directory.iterdir()) == names


def test_who_has_looked_just_before_another_was_done_adopts_nothing_again(tmp_path, monkeypatch):
    directory, adopted = write_shards(tmp_path / "data", rows(3)), []

    def glob(path, pattern, of=Path.glob):
        if not adopted:
            adopted.append(None)
            index(directory, TOKENIZER)
            adopted.append((directory / "manifest.json").stat().st_mtime_ns)
        return of(path, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    with pytest.raises(DataError, match=r"is there already; .*verify"):
        index(directory, TOKENIZER)
    assert (directory / "manifest.json").stat().st_mtime_ns == adopted[1]


@pytest.mark.parametrize("indent", [None, 4])
def test_a_tokenizer_that_lies_with_the_shards_stays_as_it_was(tmp_path, indent):
    directory = write_shards(tmp_path / "data", rows(3))
    text = json.dumps(json.loads(TOKENIZER.to_str()), indent=indent)
    (directory / "tokenizer.json").write_text(text)
    index(directory, TOKENIZER)
    assert (directory / "tokenizer.json").read_text() == text
    assert verify(directory) == []


def test_another_tokenizer_that_lies_with_the_shards_is_refused_and_stays(tmp_path):
    directory = write_shards(tmp_path / "data", rows(3))
    other = Tokenizer.from_str(TOKENIZER.to_str())
    other.add_tokens(["<|other|>"])
    other.save(str(directory / "tokenizer.json"))
    before = (directory / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match=r"tokenizer.json, which was there before, is another tokenizer than the one given"):
        index(directory, TOKENIZER)
    assert (directory / "tokenizer.json").read_bytes() == before
    assert sorted(path.suffix for path in directory.iterdir()) == [".json", ".tar"]
    assert index(directory, other).vocab_size == 258


def index_files(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.glob("*.tar.*")}


def test_index_files_that_are_there_are_held_against_the_tars_and_kept(tmp_path):
    directory = write_shards(tmp_path / "data", rows(10))
    manifest = index(directory, TOKENIZER)
    before = index_files(directory)
    (directory / "manifest.json").unlink()
    assert index(directory, TOKENIZER) == manifest
    assert index_files(directory) == before
    (directory / "manifest.json").unlink()
    (directory / "their-001.tar.idx").unlink()
    tar = bytearray((directory / "their-001.tar").read_bytes())
    tar[np.fromfile(directory / "their-000.tar.idx", "<u8")[3] + 512 + 128] ^= 1  # a length or a token of sample 3
    (directory / "their-001.tar").write_bytes(tar)
    with pytest.raises(
        DataError, match=r"their-001\.tar\.crc32, which was there .*first difference at sample 3\): one of them"
    ):
        index(directory, TOKENIZER)
    assert index_files(directory) == {name: file for name, file in before.items() if name != "their-001.tar.idx"}
    assert not (directory / "manifest.json").exists()


@pytest.mark.parametrize("suffix", ["idx", "crc32"])
def test_an_index_file_that_is_there_and_cut_is_an_error(tmp_path, suffix):
    directory = write_shards(tmp_path / "data", rows(5))
    index(directory, TOKENIZER)
    (directory / "manifest.json").unlink()
    path = directory / f"their-000.tar.{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=rf"their-000\.tar\.{suffix}, which was there before, does not fit the tar \(\d+ bytes, expected \d+"
    ):
        index(directory, TOKENIZER)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def changed(**changes):
    """Four samples, the third with other arrays."""
    samples = list(rows(4, named=False))
    samples[2].update({f"{name}.npy": array for name, array in changes.items()})
    return samples


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (changed(tokens=np.zeros(T, np.int64)), r"sample 2, .* array of '<i8' .* expected '<u2'"),
        (changed(tokens=np.zeros(T + 1, np.uint16)), r"sample 2, .* expected 16 tokens"),
        (changed(tokens=np.full(T, 257, np.uint16)), r"sample 2, .* token id 257 is not below"),
        (changed(documents=np.array([17], np.uint32)), r"sample 2, .* documents of 17 tokens in a row of 16"),
        (changed(documents=np.array([3, 0], np.uint32)), r"sample 2, .* a document of length 0"),
        (changed(tokens=np.array([{}], object)), r"sample 2, .* array of '\|O'"),
        ([*rows(2), *list(rows(3, named=False))[2:]], r"only some samples have sources\.npy"),
        ([*rows(2), {"__key__": "key9", "tokens.npy": np.zeros(T, np.uint16)}], r"sample 'key9': expected the members"),
        ([*rows(2), {"__key__": "key9", "documents.npy": np.ones(1, np.uint32)}], r"sample 'key9': expected the members"),
    ],
)
def test_a_bad_sample_is_an_error_by_its_name_and_leaves_nothing(tmp_path, samples, message):
    directory = tmp_path / "data"
    directory.mkdir()
    with tarfile.open(directory / "shard-7.tar", "w") as tar:
        for sample in samples:
            for name, array in sample.items():
                if name != "__key__":
                    add(tar, f"{sample['__key__']}.{name}", npy(array))
    with pytest.raises(DataError, match=message) as error:
        index(directory, TOKENIZER)
    assert "shard-7" in str(error.value)
    assert [path.name for path in directory.iterdir()] == ["shard-7.tar"]


def add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def evil_pyd(tar):
    add(tar, "key9.pyd", b"import os")


def evil_pickle(tar):
    add(tar, "key9.pkl", b"cos\nsystem\n(S'touch evil'\ntR.")


def symlink(tar):
    add(tar, "key9.tokens.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd")


def hard_link(tar):
    add(tar, "key9.tokens.npy", type=tarfile.LNKTYPE, linkname="key000.tokens.npy")


def parent_path(tar):
    add(tar, "../key9.tokens.npy", npy(np.zeros(T, np.uint16)))


def absolute_path(tar):
    add(tar, "/tmp/key9.tokens.npy", npy(np.zeros(T, np.uint16)))


def folder(tar):
    add(tar, "key9", type=tarfile.DIRTYPE)


def gigabyte(tar):
    add(tar, "key9.tokens.npy")
    tar.fileobj.seek(tar.offset - 512)
    info = tarfile.TarInfo("key9.tokens.npy")
    info.size = 1 << 30
    tar.fileobj.write(info.tobuf())
    tar.fileobj.truncate(tar.offset + (1 << 30))
    tar.fileobj.seek(0, io.SEEK_END)
    tar.offset += 1 << 30


def sparse(tar):
    tar.fileobj.seek(tar.offset)
    block = sparse_member("key9.tokens.npy", 10**11)
    tar.fileobj.write(block)
    tar.offset += len(block)


def twice(tar):
    add(tar, "key000.tokens.npy", npy(np.zeros(T, np.uint16)))


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (evil_pyd, r"member 'key9\.pyd': expected KEY\.tokens\.npy"),
        (evil_pickle, r"member 'key9\.pkl': expected KEY\.tokens\.npy"),
        (symlink, r"member 'key9\.tokens\.npy': expected plain files"),
        (hard_link, r"member 'key9\.tokens\.npy': expected plain files"),
        (folder, r"member 'key9': expected plain files"),
        (parent_path, r"member '\.\./key9\.tokens\.npy': expected KEY"),
        (absolute_path, r"member '/tmp/key9\.tokens\.npy': expected KEY"),
        (gigabyte, r"member 'key9\.tokens\.npy': it has 1,073,741,824 bytes"),
        (twice, r"member 'key000\.tokens\.npy': it is there twice"),
    ],
)
def test_an_evil_member_is_refused_by_its_name_and_nothing_is_run_or_extracted(tmp_path, monkeypatch, evil, message):
    monkeypatch.chdir(tmp_path)
    directory = write_shards(tmp_path / "data", rows(3))
    (path,) = directory.iterdir()
    with tarfile.open(path, "a") as tar:
        evil(tar)
    with pytest.raises(DataError, match=f"shard their-000, {message}"):
        index(directory, TOKENIZER)
    assert [file.name for file in tmp_path.rglob("*")] == ["data", "their-000.tar"]


def test_a_sparse_member_is_refused_before_its_holes_are_filled(tmp_path):
    directory = write_shards(tmp_path / "data", rows(3))
    (path,) = directory.iterdir()
    with tarfile.open(path, "a") as tar:
        sparse(tar)
    with pytest.raises(DataError, match=r"their-000.*'key9\.tokens\.npy' is a sparse file; pack it as a plain one"):
        index(directory, TOKENIZER)


def test_a_cut_shard_is_an_error(tmp_path):
    directory = write_shards(tmp_path / "data", rows(5))
    (path,) = directory.iterdir()
    data = path.read_bytes()
    manifest = index(directory, TOKENIZER)
    offsets = np.fromfile(directory / "their-000.tar.idx", "<u8").tolist()
    assert manifest.shards[0].samples == 5
    for size in (offsets[3], offsets[3] + 1024, offsets[3] + 700):
        shutil.rmtree(directory)
        directory.mkdir()
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"their-000\.tar is damaged"):
            index(directory, TOKENIZER)


def test_samples_whose_members_do_not_lie_together_are_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        for kind, array in (("tokens", np.zeros(T, np.uint16)), ("documents", np.ones(1, np.uint32))):
            for key in ("k0", "k1"):
                add(tar, f"{key}.{kind}.npy", npy(array))
    with pytest.raises(DataError, match=r"shard a, sample 'k0': expected the members .* together"):
        index(tmp_path / "data", TOKENIZER)


def test_a_shards_name_that_no_manifest_may_have_is_an_error(tmp_path):
    write_shards(tmp_path / "data", rows(2))
    (tmp_path / "data" / "their-000.tar").rename(tmp_path / "data" / "their 000.tar")
    with pytest.raises(DataError, match="rename it"):
        index(tmp_path / "data", TOKENIZER)


def test_the_manifest_names_the_end_of_documents(tmp_path):
    directory = write_shards(tmp_path / "data", rows(2))
    index(directory, TOKENIZER, end_of_document="A")
    assert json.loads((directory / "manifest.json").read_text())["end_of_document_id"] == ord("A")
    assert END_OF_DOCUMENT in (directory / "tokenizer.json").read_text()
