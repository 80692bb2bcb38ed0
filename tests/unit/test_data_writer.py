"""Shards: what is written is what is read, by us and by webdataset; and damage never goes unnoticed."""

import io
import itertools
import tarfile
import zlib

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import Manifest, Source
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.writer import Row, write_shards

T = 8


def some_rows(count, sequence_length=T):
    return [
        Row(
            np.arange(sequence_length, dtype=np.uint32) + 100 * number,
            np.array([3, 2], np.uint32),
            np.array([number % 2, 1], np.uint8),
        )
        for number in range(count)
    ]


def data_set(directory, rows, *, vocab_size=5000, named_sources=True, samples_per_shard=4):
    directory.mkdir(exist_ok=True)
    shards = write_shards(
        rows,
        directory,
        vocab_size=vocab_size,
        samples_per_shard=samples_per_shard,
        named_sources=named_sources,
    )
    names = ("prose", "web") if named_sources else ()
    return Manifest(
        sequence_length=T,
        vocab_size=vocab_size,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        sources=tuple(Source(name=name, documents=1, tokens=1) for name in names),
        shards=tuple(shards),
    )


def read_all(directory, manifest):
    reader = ShardReader(directory, manifest)
    return [
        reader.read(shard, sample) for shard, entry in enumerate(manifest.shards) for sample in reversed(range(entry.samples))
    ]


@pytest.mark.parametrize("named_sources", [True, False])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_every_sample_comes_back_as_it_was_written(tmp_path, vocab_size, dtype, named_sources):
    rows = some_rows(10)
    manifest = data_set(tmp_path, rows, vocab_size=vocab_size, named_sources=named_sources)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    assert [shard.tokens for shard in manifest.shards] == [20, 20, 10]
    samples = sorted(read_all(tmp_path, manifest), key=lambda sample: sample.key)
    assert [sample.key for sample in samples] == [f"shard-{n // 4:05d}/{n:09d}" for n in range(10)]
    for row, sample in zip(rows, samples, strict=True):
        assert sample.tokens.dtype == dtype
        assert sample.tokens.tolist() == row.tokens.tolist()
        assert sample.lengths.tolist() == row.lengths.tolist()
        if named_sources:
            assert sample.sources is not None
            assert sample.sources.tolist() == row.sources.tolist()
        else:
            assert sample.sources is None


def test_webdataset_itself_reads_the_same_samples(tmp_path):
    rows = some_rows(4)
    data_set(tmp_path, rows)
    with (tmp_path / "shard-00000.tar").open("rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": file.name, "stream": file}])))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(4)]
    for row, sample in zip(rows, samples, strict=True):
        tokens = np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == row.tokens.tolist()
        assert np.load(io.BytesIO(sample["documents.npy"])).tolist() == row.lengths.tolist()
        assert np.load(io.BytesIO(sample["sources.npy"])).tolist() == row.sources.tolist()


@pytest.mark.parametrize("named_sources", [True, False])
def test_the_tars_are_byte_for_byte_those_of_webdatasets_writer(tmp_path, named_sources):
    rows = [*some_rows(40), Row(np.arange(8, dtype=np.uint16), np.ones(8, np.uint32), np.zeros(8, np.uint8))]
    for count in (1, 3, 41):
        data_set(tmp_path, rows[-count:], named_sources=named_sources, samples_per_shard=50)
        expected = io.BytesIO()
        with TarWriter(expected, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for number, row in enumerate(rows[-count:]):
                members = {"tokens": row.tokens.astype("<u2"), "documents": row.lengths, "sources": row.sources}
                arrays = {f"{name}.npy": npy(array) for name, array in members.items() if named_sources or name != "sources"}
                writer.write({"__key__": f"{number:09d}", **arrays})
        assert (tmp_path / "shard-00000.tar").read_bytes() == expected.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_index_and_checksums_are_those_of_the_design(tmp_path):
    data_set(tmp_path, some_rows(3))
    data = (tmp_path / "shard-00000.tar").read_bytes()
    offsets = np.fromfile(tmp_path / "shard-00000.tar.idx", "<u8").tolist()
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        members = tar.getmembers()
    assert offsets[:-1] == [member.offset for member in members[::3]]
    assert not any(data[offsets[-1] :])
    crcs = np.fromfile(tmp_path / "shard-00000.tar.crc32", "<u4").tolist()
    assert crcs == [zlib.crc32(data[start:end]) for start, end in itertools.pairwise(offsets)]


def test_open_files_have_a_bound_however_many_shards_there_are(tmp_path):
    manifest = data_set(tmp_path, some_rows(20), samples_per_shard=1)
    reader = ShardReader(tmp_path, manifest, max_open_shards=3)
    for _ in range(2):
        for shard in range(20):
            reader.read(shard, 0)
    assert len(reader._shards._shards) == 3
    reader.close()
    assert len(reader._shards._shards) == 0
    assert reader.read(7, 0).key == "shard-00007/000000007"
    reader.close()


def change(path, edit):
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def flip(offset):
    def edit(data):
        data[offset] ^= 1

    return edit


def cut_to(size):
    def edit(data):
        del data[size:]

    return edit


def test_any_flipped_bit_of_a_sample_is_an_error_that_names_shard_and_sample(tmp_path):
    manifest = data_set(tmp_path, some_rows(8))
    path = tmp_path / "shard-00001.tar"
    whole = path.read_bytes()
    start, end = np.fromfile(tmp_path / "shard-00001.tar.idx", "<u8")[2:4].tolist()
    for offset in [start, start + 700, start + 1024, end - 1]:
        change(path, flip(offset))
        reader = ShardReader(tmp_path, manifest)
        with pytest.raises(DataError, match=r"shard-00001, sample 2, .* is damaged: its CRC-32"):
            reader.read(1, 2)
        assert reader.read(1, 1).key == "shard-00001/000000005"
        assert reader.read(1, 3).key == "shard-00001/000000007"
        path.write_bytes(whole)


def test_a_cut_between_members_is_an_error(tmp_path):
    manifest = data_set(tmp_path, some_rows(4))
    offsets = np.fromfile(tmp_path / "shard-00000.tar.idx", "<u8").tolist()
    change(tmp_path / "shard-00000.tar", cut_to(offsets[2] + 1024))
    reader = ShardReader(tmp_path, manifest)
    assert reader.read(0, 1).key == "shard-00000/000000001"
    for sample in (2, 3):
        with pytest.raises(DataError, match=f"shard-00000, sample {sample}, .* is damaged"):
            reader.read(0, sample)


@pytest.mark.parametrize("suffix", [".idx", ".crc32"])
def test_damage_to_the_index_files_is_an_error(tmp_path, suffix):
    manifest = data_set(tmp_path, some_rows(4))
    path = tmp_path / f"shard-00000.tar{suffix}"
    whole = path.read_bytes()
    change(path, flip(len(whole) // 4))
    with pytest.raises(DataError, match=r"sample 1, .* is damaged"):
        ShardReader(tmp_path, manifest).read(0, 1)
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(DataError, match=r"sample 3, .* is damaged"):
        ShardReader(tmp_path, manifest).read(0, 3)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        ShardReader(tmp_path, manifest).read(0, 0)


def row(tokens=range(T), lengths=(3, 2), sources=(0, 1)):
    return Row(np.array(tokens, np.uint32), np.array(lengths, np.uint32), np.array(sources, np.uint8))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (row(tokens=range(T + 1)), "expected 8 tokens"),
        (row(tokens=[5000] * T), "token id 5000 is not below the manifest's vocab_size 5000"),
        (row(lengths=(5, 4)), "documents of 9 tokens in a row of 8"),
        (row(lengths=(2**32 - 1, 2)), "documents of 4294967297 tokens"),
        (row(lengths=(5, 0)), "a document of length 0"),
        (row(sources=(0, 2)), "source 2, but the manifest names 2"),
        (row(sources=(0,)), "2 documents but 1 sources"),
    ],
)
def test_a_row_that_does_not_fit_the_manifest_is_an_error(tmp_path, written, message):
    manifest = data_set(tmp_path, [*some_rows(1), written])
    with pytest.raises(DataError, match=f"shard-00000, sample 1, .*{message}"):
        ShardReader(tmp_path, manifest).read(0, 1)


def test_a_vocabulary_of_another_width_is_an_error(tmp_path):
    manifest = data_set(tmp_path, some_rows(1))
    wider = manifest.model_copy(update={"vocab_size": 100_000})
    with pytest.raises(DataError, match=r"tokens.npy is an array of '<u2' .* expected '<u4'"):
        ShardReader(tmp_path, wider).read(0, 0)


def test_missing_and_surplus_members_are_errors(tmp_path):
    named = data_set(tmp_path, some_rows(1))
    unnamed = named.model_copy(update={"sources": ()})
    with pytest.raises(DataError, match=r"expected the members .*, got .*sources"):
        ShardReader(tmp_path, unnamed).read(0, 0)
    without = data_set(tmp_path, some_rows(1), named_sources=False)
    with pytest.raises(DataError, match=r"expected the members .*sources.*, got"):
        ShardReader(tmp_path, without.model_copy(update={"sources": named.sources})).read(0, 0)


def test_a_pickle_in_place_of_an_array_is_refused_and_not_run(tmp_path, monkeypatch):
    stream = io.BytesIO()
    np.save(stream, np.array([{"not": "numbers"}], dtype=object), allow_pickle=True)
    monkeypatch.setattr("pipeline.data.shards.writer._to_npy", lambda array: stream.getvalue())
    manifest = data_set(tmp_path, some_rows(1))
    with pytest.raises(DataError, match=r"tokens.npy is an array of '\|O'"):
        ShardReader(tmp_path, manifest).read(0, 0)


@pytest.mark.parametrize(
    "claim",
    [
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000,), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (8, 1), }",
        b"__import__('os').getpid()",
        b"{",
        b"",
    ],
)
def test_an_array_header_is_not_believed(tmp_path, monkeypatch, claim):
    header = b"\x93NUMPY\x01\x00" + len(claim).to_bytes(2, "little") + claim
    monkeypatch.setattr("pipeline.data.shards.writer._to_npy", lambda array: header + bytes(16))
    manifest = data_set(tmp_path, some_rows(1))
    with pytest.raises(DataError, match=r"sample 0, .* is damaged: tokens.npy"):
        ShardReader(tmp_path, manifest).read(0, 0)


def test_a_sample_that_the_manifest_does_not_have_is_an_index_error(tmp_path):
    manifest = data_set(tmp_path, some_rows(4))
    reader = ShardReader(tmp_path, manifest)
    for sample in (-1, 4):
        with pytest.raises(IndexError, match="samples 0 to 3"):
            reader.read(0, sample)
