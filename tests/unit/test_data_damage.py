"""Damage of every kind: an error that names shard and sample, or a row of padding in the sample's place; nothing else."""

import errno
import io
import itertools
import json
import os
import resource
import shutil
import tarfile
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.errors import DataError
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.losses_writer import LossesWriter
from pipeline.data.shards.manifest import read_manifest, write_manifest
from pipeline.data.shards.reader import DamagedSampleError, ShardReader
from pipeline.data.shards.reference_losses import (
    CachedLosses,
    LossesManifest,
    ReaderWithLosses,
    check_alike,
    read_losses_manifest,
)
from pipeline.data.shards.table import ShardTable
from pipeline.data.shards.writer import write_shards
from pipeline.storage.files import LocalFile
from tests.data_sets import numbered_data, numbered_row

SIZES = {"lanes": 4, "global_batch": 4, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 5, "shuffle_block": 16}
NUM_SAMPLES = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three shards of 8 samples of 4 tokens."""
    return numbered_data(tmp_path_factory.mktemp("whole") / "data", NUM_SAMPLES, samples_per_shard=8)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


def offsets(folder, shard=1):
    return np.fromfile(folder / f"shard-{shard:05d}.tar.idx", "<u8").tolist()


def rewrite(folder, sample, members=None, edit=None, **tar_info):
    """Put another sample in the place of one of shard 1, with offsets and checksums that fit; an attacker can do that."""
    path, bounds = folder / "shard-00001.tar", offsets(folder)
    data = path.read_bytes()
    blocks = [data[start:end] for start, end in itertools.pairwise(bounds)]
    if members is not None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                for key, value in tar_info.items():
                    setattr(info, key, value)
                tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
            end = tar.offset
        blocks[sample] = stream.getvalue()[:end]
    if edit is not None:
        blocks[sample] = edit(blocks[sample])
    rest = -sum(map(len, blocks)) % 10240
    path.write_bytes(b"".join(blocks) + bytes(rest))
    np.cumsum([0, *map(len, blocks)]).astype("<u8").tofile(f"{path}.idx")
    np.array([zlib.crc32(block) for block in blocks], "<u4").tofile(f"{path}.crc32")
    manifest = read_manifest_of_any_size(folder)
    shards = list(manifest.shards)
    crc32 = f"{zlib.crc32((folder / 'shard-00001.tar.crc32').read_bytes()):08x}"
    shards[1] = shards[1].model_copy(update={"bytes": path.stat().st_size, "crc32": crc32})
    write_manifest(folder, manifest.model_copy(update={"shards": tuple(shards)}))


def read_manifest_of_any_size(folder):
    import pipeline.data.shards.manifest as module

    return module._parse((folder / "manifest.json").read_text(), "")


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def members(**changes):
    arrays = {"documents": np.array([3], "<u4"), "sources": np.zeros(1, "u1"), "tokens": np.arange(4, dtype="<u2")} | changes
    return [(f"000000011.{name}.npy", npy(array)) for name, array in arrays.items()]


def members_with_header(header):
    """The same members, the tokens' npy header another; numpy itself would not write it."""
    text = header.encode() + b"\n"
    tokens = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + np.arange(4, dtype="<u2").tobytes()
    return [(name, tokens if "tokens" in name else data) for name, data in members()]


def sparse_member(name, claimed):
    """512 bytes that GNU's extension calls a file of `claimed`, the rest of it holes."""
    fields = {"major": "0", "minor": "1", "name": name, "size": str(claimed), "map": "0,512"}
    records = b"".join(pax_record(f"GNU.sparse.{key}={value}\n".encode()) for key, value in fields.items())
    blocks = []
    for member, kind, size in ((name, b"x", len(records)), (name, b"0", 512)):
        info = tarfile.TarInfo(member)
        info.type, info.size = kind, size
        blocks.append(info.tobuf(tarfile.USTAR_FORMAT))
    return blocks[0] + records + bytes(-len(records) % 512) + blocks[1] + b"\1" * 512


def pax_record(text):
    length = next(length for length in range(len(text), len(text) + 10) if len(f"{length} ") + len(text) == length)
    return f"{length} ".encode() + text


def flip(position, bit=1):
    def edit(data):
        return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]

    return edit


def change_file(folder, name, edit):
    (folder / name).write_bytes(edit((folder / name).read_bytes()))


def swap(folder, *suffixes):
    for suffix in suffixes:
        shutil.copy(folder / f"shard-00002.{suffix}", folder / f"shard-00001.{suffix}")


def at(folder, within):
    return offsets(folder)[3] + within


# Each: what is done to the folder (sample 3 of shard 1 is the victim), which samples of the shard are lost, what is said.
CASES = {
    "cut at a member's boundary": (lambda f: os.truncate(f / "shard-00001.tar", at(f, 1024)), range(3, 8), "expected .* bytes"),
    "cut in a header": (lambda f: os.truncate(f / "shard-00001.tar", at(f, 1024 + 200)), range(3, 8), "expected .* bytes"),
    "cut in a payload": (lambda f: os.truncate(f / "shard-00001.tar", at(f, 512 + 60)), range(3, 8), "expected .* bytes"),
    "a bit of a header": (lambda f: change_file(f, "shard-00001.tar", flip(at(f, 130))), [3], "CRC-32"),
    "a bit of a payload": (lambda f: change_file(f, "shard-00001.tar", flip(at(f, 512 + 129))), [3], "CRC-32"),
    "a missing shard": (lambda f: (f / "shard-00001.tar").unlink(), range(8), "No such file"),
    "a missing index": (lambda f: (f / "shard-00001.tar.idx").unlink(), range(8), "No such file"),
    "a swapped shard": (lambda f: shutil.copy(f / "shard-00002.tar", f / "shard-00001.tar"), range(8), "CRC-32"),
    "a shard swapped with its index files": (
        lambda f: swap(f, "tar", "tar.idx", "tar.crc32"),
        range(8),
        "the CRC-32 of its piece of its shard's .crc32 is .* the shard was exchanged for another",
    ),
    "a bit of the checksums": (
        lambda f: change_file(f, "shard-00001.tar.crc32", flip(12)),
        range(8),
        "the CRC-32 of its piece of its shard's .crc32 is .*: the file is damaged",
    ),
    "an index of another shard": (
        lambda f: change_file(f, "shard-00001.tar.crc32", lambda data: (f / "shard-00002.tar.crc32").read_bytes()),
        range(8),
        "CRC-32",
    ),
    "a wrong dtype": (lambda f: rewrite(f, 3, members(tokens=np.arange(4, dtype="<i8"))), [3], "'<i8'.*expected '<u2'"),
    "an id beyond V": (
        lambda f: rewrite(f, 3, members(tokens=np.full(4, 60_000, "<u2"))),
        [3],
        "60000 is not below",
    ),
    "lengths beyond the row": (lambda f: rewrite(f, 3, members(documents=np.array([5], "<u4"))), [3], "5 tokens in a row of 4"),
    "a row of another length": (lambda f: rewrite(f, 3, members(tokens=np.arange(5, dtype="<u2"))), [3], "expected 4 tokens"),
    "a member twice": (lambda f: rewrite(f, 3, [*members(), members()[0]]), [3], "twice"),
    "an evil pyd": (lambda f: rewrite(f, 3, [*members(), ("000000011.pyd", b"import os")]), [3], "expected the members"),
    "an evil pickle": (
        lambda f: rewrite(f, 3, [*members(), ("000000011.pkl", b"cos\nsystem\n.")]),
        [3],
        "expected the members",
    ),
    "a symbolic link": (
        lambda f: rewrite(f, 3, [("000000011.tokens.npy", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        [3],
        "a member that is no file",
    ),
    "a name that points outside": (
        lambda f: rewrite(f, 3, [(f"../../{name}", data) for name, data in members()]),
        [3],
        "points outside",
    ),
    "a gigabyte that is not there": (
        lambda f: rewrite(f, 3, edit=lambda block: claim(block, 2**30)),
        [3],
        "claims 1073741824 bytes",
    ),
    "a length of five thousand digits": (
        lambda f: rewrite(
            f, 3, members_with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (0x1%s,)}" % ("0" * 4200))
        ),
        [3],
        "tokens.npy is an array of {'descr': '<u2'.*expected '<u2' with one dimension",
    ),
    "a type of five thousand digits": (
        lambda f: rewrite(f, 3, members_with_header("{'descr': 0x1%s, 'fortran_order': False, 'shape': (4,)}" % ("0" * 4200))),
        [3],
        "tokens.npy is an array of {'descr': 0x10.*expected '<u2' with one dimension",
    ),
    "a sparse member": (
        lambda f: rewrite(f, 3, edit=lambda block: block + sparse_member("000000011.zzz.npy", 10**11)),
        [3],
        "a member that is a sparse file",
    ),
    "a member that is far too large": (
        lambda f: rewrite(f, 3, [*members(), ("000000011.evil", bytes(2**20))]),
        [3],
        "a row has at most",
    ),
}


def claim(block, size):
    header = bytearray(block[:512])
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + block[512:]


@pytest.mark.parametrize("case", CASES)
def test_damage_is_an_error_that_names_shard_and_sample_and_costs_nothing_else(folder, whole, case):
    damage, lost, message = CASES[case]
    damage(folder)
    reader, right = ShardReader(folder, read_manifest_of_any_size(folder)), ShardReader(whole, read_manifest(whole))
    for shard in range(3):
        for sample in range(8):
            if shard == 1 and sample in lost:
                with pytest.raises(
                    DamagedSampleError, match=f"^shard shard-00001, sample {sample}, in .* is damaged: .*{message}"
                ):
                    reader.read(shard, sample)
            else:
                assert reader.read(shard, sample).tokens.tolist() == right.read(shard, sample).tokens.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "case",
    ["a bit of a payload", "cut in a payload", "a missing shard", "a wrong dtype", "a shard swapped with its index files"],
)
def test_a_row_of_padding_takes_the_place_of_a_damaged_sample_and_all_others_stay_where_they_were(
    folder, whole, case, num_workers
):
    damage, lost, _ = CASES[case]
    if case == "a wrong dtype":  # with a manifest that fits
        damage(folder)
    stream = Stream(folder, **SIZES, raises=False, num_workers=num_workers)
    if case != "a wrong dtype":  # after the start: what is missing before is refused
        damage(folder)
    right = list(Stream(whole, **SIZES).iterate(0, end_sample=24))
    found = list(stream.iterate(0, end_sample=24))
    messages = [message for batch in found for message in batch.damage]
    assert len(messages) == len(lost)
    for batch, expected in zip(found, right, strict=True):
        for row, key in enumerate(expected.keys):
            if key in {f"shard-00001/{8 + sample:09d}" for sample in lost}:
                assert batch.keys[row].startswith("shard-00001/(damaged: sample ")
                assert (batch.document_ids_BT[row] == -1).all()
                assert not batch.tokens_BT[row].any()
            else:
                assert batch.keys[row] == key
                assert batch.tokens_BT[row].tolist() == expected.tokens_BT[row].tolist()


def test_a_folder_whose_manifest_has_no_checksums_of_the_checksums_is_read_as_before(folder, whole):
    content = json.loads((folder / "manifest.json").read_text())
    crc32 = content["shards"][1].pop("crc32")
    (folder / "manifest.json").write_text(json.dumps(content))
    manifest = read_manifest(folder)
    assert [shard.crc32 is None for shard in manifest.shards] == [False, True, False]
    assert f"{zlib.crc32((folder / 'shard-00001.tar.crc32').read_bytes()):08x}" == crc32
    reader, right = ShardReader(folder, manifest), ShardReader(whole, read_manifest(whole))
    assert reader.read(1, 3).tokens.tolist() == right.read(1, 3).tokens.tolist()


@pytest.fixture(scope="module")
def long_shards(tmp_path_factory):
    # Two shards of 2,500 samples: pieces of 1,024, 1,024 and 452.
    return numbered_data(tmp_path_factory.mktemp("long") / "data", 5000, samples_per_shard=2500)


def damaged_samples(folder, manifest, shard=0):
    reader = ShardReader(folder, manifest)
    read = reader.read_many([shard] * 2500, list(range(2500)))
    reader.close()
    return [sample for sample, found in enumerate(read) if found.damage is not None]


@pytest.mark.parametrize(
    ("checksum", "lost"), [(0, (0, 1024)), (1023, (0, 1024)), (1024, (1024, 2048)), (2048, (2048, 2500)), (2499, (2048, 2500))]
)
def test_a_bit_of_the_checksums_costs_its_piece_of_a_thousand_samples(long_shards, tmp_path, checksum, lost):
    folder = shutil.copytree(long_shards, tmp_path / "data")
    change_file(folder, "shard-00000.tar.crc32", flip(4 * checksum + 2))
    assert damaged_samples(folder, read_manifest(folder)) == list(range(*lost))
    assert damaged_samples(folder, read_manifest(folder), shard=1) == []


def test_of_a_shard_exchanged_for_another_no_sample_is_used_that_is_not_in_a_piece_of_both(long_shards, tmp_path):
    folder = numbered_data(tmp_path / "data", 5000, samples_per_shard=2500)
    rows = [numbered_row(number, 4, 2) for number in [*range(1024), *range(2024, 3500)]]
    write_shards(rows, tmp_path, vocab_size=60_000, samples_per_shard=2500, named_sources=True)
    for suffix in ("tar", "tar.idx", "tar.crc32"):
        shutil.copy(tmp_path / f"shard-00000.{suffix}", folder / f"shard-00000.{suffix}")
    assert damaged_samples(folder, read_manifest(folder)) == list(range(1024, 2500))


def test_of_the_checksums_that_piece_is_read_and_held_against_the_manifest_which_is_wanted(long_shards, monkeypatch):
    reader, asked = ShardReader(long_shards, read_manifest(long_shards)), []
    read = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda file, start, size: asked.append((start, size)) or read(file, start, size))
    reader.read_many([0, 0], [2100, 2499])
    assert asked[:3] == [(4 * 2048, 4 * 452), (8 * 2100, 16), (8 * 2499, 16)]
    reader.read_many([0], [2200])
    assert asked[5] == (8 * 2200, 16)  # after those of the samples
    assert len(asked) == 7
    reader.close()


def test_what_is_missing_at_the_start_is_refused_at_the_start(folder):
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001.tar cannot be found"):
        Stream(folder, **SIZES, raises=False)


@contextmanager
def no_more_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def gone(folder):
    folder.rename(folder.with_name("elsewhere"))
    try:
        yield
    finally:
        folder.with_name("elsewhere").rename(folder)


@contextmanager
def unmounted(folder):
    """An empty folder in its place, as a mount point is."""
    with gone(folder):
        folder.mkdir()
        try:
            yield
        finally:
            folder.rmdir()


@contextmanager
def stale(folder):
    """What a file system of the network says of a folder, and of all in it, that its server has forgotten."""

    def refusing(call):
        def refused(path, *arguments, **options):
            if str(path).startswith(str(folder)):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return call(path, *arguments, **options)

        return refused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refusing(os.open))
        patch.setattr(os, "stat", refusing(os.stat))
        yield


def test_what_is_wrong_with_the_machine_is_an_error_and_never_a_row_of_padding(folder, whole):
    reader, right = ShardReader(folder, read_manifest(folder)), ShardReader(whole, read_manifest(whole))
    with no_more_open_files(), pytest.raises(DataError, match=r"Too many open files; .* not the data: .*ulimit -n"):
        reader.read_many([1], [3])
    with gone(folder), pytest.raises(DataError, match=r"No such file.*not the data: mend that and go on"):
        reader.read_many([1], [3])
    with stale(folder), pytest.raises(DataError, match=r"Stale file handle; .* not the data: mend that and go on"):
        reader.read_many([1], [3])
    with unmounted(folder), pytest.raises(DataError, match=r"No such file.*not the data: mend that and go on"):
        reader.read_many([1], [3])
    (folder / "shard-00002.tar.idx").unlink()
    (folder / "shard-00002.tar.idx").symlink_to("shard-00002.tar.idx")
    with pytest.raises(DataError, match=r"shard-00002\.tar\.idx cannot be read: Too many levels .*not the data"):
        reader.read_many([1, 2], [3, 3])
    (sample,) = reader.read_many([1], [3])
    assert (sample.damage, sample.tokens.tolist()) == (None, right.read(1, 3).tokens.tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", [gone, unmounted, stale])
def test_training_stops_where_the_machine_is_at_fault_though_damage_would_be_skipped(folder, num_workers, fault):
    batches = Stream(folder, **SIZES, raises=False, num_workers=num_workers).iterate(0, end_sample=24)
    with fault(folder):
        batch = next(batches)
    assert (len(batch.damage), "the machine is at fault and not the data" in (batch.failure or "")) == (0, True)


def scored(cache, data, number):
    """The losses of numbered data, folder and manifest: for row n of shard s 100 s + n + `number`."""
    manifest = read_manifest(data)
    losses = LossesManifest(
        data_sha256="0" * 64,
        reference_sha256=f"{number:064}",
        reference="",
        precision="fp32",
        horizon="shifted",
        dtype="float32",
        sequence_length=4,
        columns=1,
    )
    writer = LossesWriter(cache, losses, manifest)
    assert not writer.begin()
    for shard, first, end in writer.missing():
        rows = np.arange(first, end, dtype=np.float32)[:, None, None]
        writer.write((shard, first, end), np.broadcast_to(100 * shard + rows + number, (end - first, 4, 1)))
    for shard in range(len(manifest.shards)):
        writer.join(shard)
    writer.finish()
    return writer.folder, ReaderWithLosses(ShardReader(data, manifest), CachedLosses(cache, losses))


def test_reference_losses_that_cannot_be_reached_are_an_error_and_missing_ones_damage(whole, tmp_path):
    losses, reader = scored(tmp_path, whole, 0)
    with gone(losses), pytest.raises(DataError, match=r"No such file.*not the data"):
        reader.read_many([1], [3])
    (losses / "shard-00002.losses.crc32").unlink()
    one, two = reader.read_many([1, 2], [3, 3])
    assert (one.damage, one.reference_losses.tolist()) == (None, [[103.0]] * 4)
    assert "score the data again" in two.damage


def test_reference_losses_of_another_shard_or_reference_are_not_taken_for_the_right_ones(whole, tmp_path):
    losses, reader = scored(tmp_path / "one", whole, 0)
    others, _ = scored(tmp_path / "other", whole, 5)
    for suffix in ("losses", "losses.crc32"):
        first, second = (losses / f"shard-0000{number}.{suffix}" for number in (0, 1))
        first.rename(tmp_path / "spare")
        second.rename(first)
        (tmp_path / "spare").rename(second)
        shutil.copy(others / f"shard-00002.{suffix}", losses)
    for sample in reader.read_many([0, 1, 2], [3, 3, 3]):
        assert "are damaged, or not of this shard; copy the folder again" in sample.damage


def test_pieces_of_a_cache_are_complete_by_their_checksums(tmp_path):
    data = numbered_data(tmp_path / "data", 12, samples_per_shard=2)
    losses, _ = scored(tmp_path, data, 0)
    manifest = read_manifest(data)
    writer = LossesWriter(tmp_path, LossesManifest.model_validate_json((losses / "manifest.json").read_bytes()), manifest)
    assert writer.begin()
    assert writer.damaged() == []

    # Cut, damaged, exchanged, or empty after a crash of the machine: computed again, and nothing else is.
    kept = {shard.name: (losses / f"{shard.name}.losses").read_bytes() for shard in manifest.shards}
    partial = losses.rename(writer.partial)
    pieces = writer.missing()
    assert len(pieces) == len(manifest.shards) > 4
    for piece in pieces:
        writer.write(piece, np.frombuffer(kept[manifest.shards[piece[0]].name], "<f4").reshape(-1, 4, 1))
    assert writer.missing() == []
    files = sorted(partial.glob("*.piece"))
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(contents[0][:-4])
    files[1].write_bytes(contents[1][:9] + bytes([contents[1][9] ^ 1]) + contents[1][10:])
    files[2].write_bytes(contents[3])
    files[4].write_bytes(b"")
    assert writer.missing() == [pieces[0], pieces[1], pieces[2], pieces[4]]
    assert sorted(writer.missing(0, 2) + writer.missing(1, 2)) == writer.missing()
    with pytest.raises(DataError, match=r"00000000.piece: missing or damaged since it was written"):
        writer.join(0)


def test_a_cache_whose_scoring_did_not_finish_is_said_to_be_just_that(whole, tmp_path):
    folder, _ = scored(tmp_path, whole, 0)
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    with pytest.raises(DataError, match="the data as it is now, its scoring was begun and is not finished; score it with"):
        read_losses_manifest(tmp_path, "0" * 64, "the data")
    with pytest.raises(DataError, match="it has no reference losses at all"):
        read_losses_manifest(tmp_path, "1" * 64, "the data")


def test_a_finished_cache_with_a_damaged_shard_is_not_taken_for_whole(whole, tmp_path):
    losses, _ = scored(tmp_path, whole, 0)
    content = (losses / "shard-00001.losses").read_bytes()
    (losses / "shard-00001.losses").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (losses / "shard-00002.losses").unlink()
    writer = LossesWriter(
        tmp_path, LossesManifest.model_validate_json((losses / "manifest.json").read_bytes()), read_manifest(whole)
    )
    assert writer.damaged() == ["shard-00001", "shard-00002"]


def test_the_losses_of_two_references_or_dtypes_are_not_mixed(whole, tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    found = []
    for cache, number in ((one, 0), (two, 5)):
        losses, _ = scored(cache, whole, number)
        found.append(CachedLosses(cache, LossesManifest.model_validate_json((losses / "manifest.json").read_bytes())))
    check_alike(found[:1])
    with pytest.raises(DataError, match=r"has reference_sha256 0+ .*/two/.* has 0+5 .* the losses of one reference"):
        check_alike(found)
    halved = found[0].manifest.model_copy(update={"dtype": "float16"})
    with pytest.raises(DataError, match=r"has dtype float32 .* has float16"):
        check_alike([found[0], CachedLosses(one, halved)])


def test_reference_losses_of_a_version_whose_checksums_say_less_are_refused(whole, tmp_path):
    losses, _ = scored(tmp_path, whole, 0)
    manifest = json.loads((losses / "manifest.json").read_text())
    (losses / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(DataError, match=r"cannot be read \((.|\n)*format_version(.|\n)*\); remove .* and score it"):
        read_losses_manifest(tmp_path, "0" * 64, "the data")


edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.integers(1, 1024)),
        st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 2048)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(edits=edits, suffix=st.sampled_from(["tar", "tar", "tar", "tar.idx", "tar.crc32"]), has_crc32=st.booleans())
def test_any_mutation_of_a_shard_is_refused_or_gives_the_right_tokens(whole, tmp_path, edits, suffix, has_crc32):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = folder / f"shard-00001.{suffix}"
    data = bytearray(path.read_bytes())
    for kind, where, amount in edits:
        position = int(where * len(data))
        if kind == "flip" and data:
            data[position] ^= amount
        elif kind == "cut":
            del data[position:]
        elif kind == "insert":
            data[position:position] = bytes(amount)
        elif kind == "delete":
            del data[position : position + amount]
    path.write_bytes(data)
    right = ShardReader(whole, read_manifest(whole))
    manifest = read_manifest(whole)
    if not has_crc32:  # what came before must do without the checksum of the checksums
        shards = [shard.model_copy(update={"crc32": None}) for shard in manifest.shards]
        manifest = manifest.model_copy(update={"shards": ShardTable.of(shards)})
    reader = ShardReader(folder, manifest)
    for sample, found in enumerate(reader.read_many([1] * 8, list(range(8)))):
        expected = right.read(1, sample)
        if found.damage is None:
            assert (found.key, found.tokens.tolist(), found.lengths.tolist()) == (
                expected.key,
                expected.tokens.tolist(),
                expected.lengths.tolist(),
            )
        else:
            assert found.damage.startswith(f"shard shard-00001, sample {sample}, in ")
            assert (len(found.tokens), len(found.lengths)) == (4, 0)
