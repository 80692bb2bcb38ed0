"""One sample's bytes: decoded as webdataset's own reader decodes them, and never less strictly."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from pipeline.data.shards.manifest import Manifest, Source
from pipeline.data.shards.sample import DamageError, SampleDecoder, members_of


def by_webdataset(data):
    (sample,) = group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(data)}]))
    return sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")}


def tar_of(members, **changes):
    """The blocks of one sample, as `tarfile` writes them; `members` are (name, bytes) pairs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=changes.pop("format", tarfile.PAX_FORMAT)) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
        end = tar.offset
    return stream.getvalue()[:end]


keys = st.from_regex(r"([a-z0-9]{1,8}/){0,2}[a-zA-Z0-9_-]{1,30}", fullmatch=True)
names = st.lists(
    st.sampled_from(["tokens.npy", "documents.npy", "sources.npy", "Tokens.NPY", "txt", "a.b.c"]),
    min_size=1,
    unique_by=str.lower,
)


@given(
    key=keys,
    names=names,
    data=st.data(),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
)
def test_members_are_those_that_webdataset_finds(key, names, data, format):
    members = [(f"{key}.{name}", data.draw(st.binary(max_size=1200))) for name in names]
    written = tar_of(members, format=format, mtime=data.draw(st.sampled_from([0, 1_700_000_000])))
    assert members_of(written) == by_webdataset(written)


@pytest.mark.parametrize("key", ["a" * 150, "d/" * 60 + "x", "zoë"])
def test_long_and_foreign_names_and_fractions_of_a_second_are_left_to_webdataset_and_come_out_the_same(key):
    written = tar_of([(f"{key}.tokens.npy", b"abc"), (f"{key}.documents.npy", b"de")], mtime=1.5)
    assert b"PaxHeader" in written
    assert members_of(written) == by_webdataset(written)
    gnu = tar_of([(f"{key}.tokens.npy", b"abc")], format=tarfile.GNU_FORMAT)
    assert members_of(gnu) == by_webdataset(gnu)


def test_what_a_plain_webdataset_writer_writes_is_read():
    stream = io.BytesIO()
    writer = TarWriter(stream, encoder=False)
    writer.write({"__key__": "s/17", "tokens.npy": b"abc", "documents.npy": b"d"})
    end = writer.tarstream.offset
    writer.close()
    written = stream.getvalue()[:end]
    assert members_of(written) == by_webdataset(written) == ("s/17", {"documents.npy": b"d", "tokens.npy": b"abc"})


def header_with(data, edit):
    """The first header changed by `edit`, with a checksum that fits."""
    header = bytearray(data[:512])
    edit(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def put(start, value):
    def edit(header):
        header[start : start + len(value)] = value

    return edit


GOOD = tar_of([("k.tokens.npy", b"abc"), ("k.documents.npy", b"d")])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (GOOD[:1024], None),  # whole members
        (GOOD[:700], "claims 3 bytes|ends 324 bytes beyond"),
        (GOOD[:300], "cut to 300 bytes"),
        (GOOD + bytes(512), "checksum"),
        (bytes([GOOD[0] ^ 1]) + GOOD[1:], "checksum"),
        (GOOD + GOOD, "the member tokens.npy is there twice"),
        (GOOD + tar_of([("other.tokens.npy", b"")]), "the keys k and other"),
        (tar_of([("../k.tokens.npy", b"abc")]), r"points outside: '../k.tokens.npy'"),
        (tar_of([("a/../../k.tokens.npy", b"abc")]), "points outside"),
        (tar_of([("/etc/k.tokens.npy", b"abc")]), "points outside") ,
        (tar_of([("k", b"abc")]), "expected KEY.NAME"),
        (tar_of([(".npy", b"abc")]), "expected KEY.NAME"),
        (tar_of([("k.tokens.npy", b"")], type=tarfile.SYMTYPE, linkname="/x"), "no file: 'k.tokens.npy', of type b'2'"),
        (tar_of([("k.tokens.npy", b"")], type=tarfile.LNKTYPE, linkname="k"), "of type b'1'"),
        (tar_of([("k.tokens.npy", b"")], type=tarfile.CHRTYPE), "of type b'3'"),
        (tar_of([("k.tokens.npy", b"")], type=tarfile.DIRTYPE), "of type b'5'"),
        (header_with(GOOD, put(124, b"10000000000\0")), "claims 1073741824 bytes, 1536 are there"),
        (header_with(GOOD, put(124, b"-0000000001\0")), "claims -1 bytes"),
        (header_with(GOOD, put(124, b"\x80" + bytes(10) + b"\3")), "no number"),
        (header_with(GOOD, put(124, b"12345678999\0")), "no number"),
    ],
)  # fmt: skip
def test_what_no_honest_writer_writes_is_damage(data, message):
    if message is None:
        assert set(members_of(data)[1]) == {"tokens.npy"}
        return
    with pytest.raises(DamageError, match=message):
        members_of(data)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def decoder(**changes):
    values = {
        "sequence_length": 4,
        "vocab_size": 100,
        "end_of_document_id": 0,
        "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": "0" * 64,
        "sources": (Source(name="a", documents=1, tokens=1),),
        "shards": (),
    }
    return SampleDecoder(Manifest(**values | changes))


RIGHT = {"tokens": np.arange(4, dtype="<u2"), "documents": np.array([1, 2], "<u4"), "sources": np.zeros(2, "u1")}


def decoded(changes, **manifest):
    arrays = RIGHT | changes
    return decoder(**manifest).decode(tar_of([(f"k.{name}.npy", npy(array)) for name, array in arrays.items()]), "shard-00007")


def test_a_right_sample_is_decoded_read_only():
    sample = decoded({})
    assert (sample.key, sample.damage) == ("shard-00007/k", None)
    assert [array.tolist() for array in (sample.tokens, sample.lengths, sample.sources)] == [[0, 1, 2, 3], [1, 2], [0, 0]]
    assert not any(array.flags.writeable for array in (sample.tokens, sample.lengths, sample.sources))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.arange(4, dtype=">u2")}, "'>u2'"),
        ({"tokens": np.arange(4, dtype="<i8")}, "array of '<i8' .* expected '<u2'"),
        ({"tokens": np.arange(4, dtype="<f2")}, "'<f2'"),
        ({"tokens": np.arange(5, dtype="<u2")}, "expected 4 tokens"),
        ({"tokens": np.full(4, 100, "<u2")}, "token id 100 is not below"),
        ({"tokens": np.zeros((2, 2), "<u2")}, "one dimension"),
        ({"tokens": np.array([{"run": "me"}], object)}, r"array of '\|O'"),
        ({"documents": np.array([3, 2], "<u4")}, "documents of 5 tokens in a row of 4"),
        ({"documents": np.array([4, 0], "<u4")}, "a document of length 0"),
        ({"documents": np.array([2**32 - 1, 2], "<u4")}, "documents of 4294967297 tokens"),
        ({"sources": np.zeros(1, "u1")}, "2 documents but 1 sources"),
        ({"sources": np.array([0, 1], "u1")}, "source 1, but the manifest names 1"),
        ({"evil": np.zeros(1)}, "expected the members"),
    ],
)
def test_arrays_that_do_not_fit_the_manifest_are_damage(changes, message):
    with pytest.raises(DamageError, match=message):
        decoded(changes)


@pytest.mark.parametrize("name", ["k.pyd", "k.pkl", "k.tokens.pyd", "k.tokens.npy.pickle"])
def test_members_that_a_careless_decoder_would_run_are_refused_unopened(name, tmp_path):
    marker = tmp_path / "ran"
    bomb = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    members = [(f"k.{part}.npy", npy(array)) for part, array in RIGHT.items()]
    with pytest.raises(DamageError, match="expected the members"):
        decoder().decode(tar_of([*members, (name, bomb)]), "s")
    assert not marker.exists()


@given(data=st.data())
def test_any_change_of_bytes_is_refused_or_leaves_what_webdataset_would_find(data):
    whole = bytearray(tar_of([(f"k.{name}.npy", npy(array)) for name, array in RIGHT.items()]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    changed = bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    try:
        found = members_of(changed)
    except DamageError:
        return
    assert found == by_webdataset(changed)
