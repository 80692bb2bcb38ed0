"""Tars of others: a cut or damaged one is an error, never merely shorter."""

import io
import tarfile

import pytest

from pipeline.data.errors import DataError
from pipeline.data.shards.tars import members, read_member

CONTENTS = {"a.txt": b"first", "b.txt": b"x" * 1000, "c.txt": b"", "d" * 120 + ".txt": b"long name"}


@pytest.fixture(params=[tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def tar(tmp_path, request):
    path = tmp_path / "a.tar"
    contents = dict(list(CONTENTS.items())[:3]) if request.param == tarfile.USTAR_FORMAT else CONTENTS
    with tarfile.open(path, "w", format=request.param) as file:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if request.param == tarfile.PAX_FORMAT else 1
            file.addfile(info, io.BytesIO(data))
    return path


def read_all(path):
    with path.open("rb") as file:
        return {member.name: read_member(file, member) for member in members(path)}


def test_members_of_any_format_are_read(tar):
    found = read_all(tar)
    assert found == {name: CONTENTS[name] for name in found}
    assert len(found) >= 3
    offsets = [(member.header, member.end) for member in members(tar)]
    assert offsets[0][0] == 0
    assert [start for start, _ in offsets[1:]] == [end for _, end in offsets[:-1]]


def test_a_tar_cut_anywhere_is_an_error(tar):
    data = tar.read_bytes()
    whole = read_all(tar)
    end = max(member.end for member in members(tar))
    for size in [*range(0, end + 513, 256), end - 1, end + 1023]:
        tar.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"a\.tar is damaged"):
            read_all(tar)
    tar.write_bytes(data[: end + 1024])
    assert read_all(tar) == whole


def test_a_damaged_header_is_an_error_and_not_the_end(tar):
    data = bytearray(tar.read_bytes())
    for member in list(members(tar)):
        for offset in (member.data - 512 + 100, member.data - 512 + 130, member.data - 512 + 148):
            data[offset] ^= 0x55
            tar.write_bytes(data)
            with pytest.raises(DataError, match=r"a\.tar is damaged"):
                read_all(tar)
            data[offset] ^= 0x55


def test_what_follows_the_end_is_an_error(tar):
    tar.write_bytes(tar.read_bytes() + b"more")
    with pytest.raises(DataError, match="neither a member nor the end"):
        read_all(tar)


def test_a_member_that_claims_more_than_the_file_has_is_an_error_without_being_read(tmp_path):
    info = tarfile.TarInfo("a.txt")
    info.size = 7 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        list(members(tmp_path / "a.tar"))
