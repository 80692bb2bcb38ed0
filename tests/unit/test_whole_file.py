"""A file that is there whole or not at all, whoever fails, is killed or writes beside."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage.whole_file import atomic_write, free_on_disk, publish, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record syncs and renames in their order: ("sync", name) and ("rename", name afterwards)."""
    found = []

    def fsync(descriptor, fsync=os.fsync):
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replace(source, target, replace=os.replace):
        found.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return found


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_afterwards(tmp_path, calls):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_file(folder / "a", b"new")
    (first, temporary), *others = calls
    assert (first, temporary.startswith("a."), temporary.endswith(".tmp")) == ("sync", True, True)
    assert others == [("rename", "a"), ("sync", "folder")]
    assert names(folder) == ["a"]


def test_what_need_not_outlive_the_machine_is_not_synced(tmp_path, calls):
    write_file(tmp_path / "a", b"new", synced=False)
    assert calls == [("rename", "a")]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_finished_file_and_a_finished_folder_are_synced_before_they_have_their_names(tmp_path, calls):
    for folder in ("made", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "made" / "a").write_bytes(b"new")
    publish(tmp_path / "made" / "a", tmp_path / "there" / "b")
    assert calls == [("sync", "a"), ("rename", "b"), ("sync", "there")]
    calls.clear()
    publish(tmp_path / "there", tmp_path / "c")
    assert calls == [("sync", "there"), ("rename", "c"), ("sync", tmp_path.name)]
    assert (tmp_path / "c" / "b").read_bytes() == b"new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, failing, before):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if before is not None:
        (tmp_path / "a").write_bytes(before)
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({} if before is None else {"a": before})


def test_a_writer_that_raises_leaves_what_was_there_and_nothing_else(tmp_path):
    write_file(tmp_path / "a", b"old")

    def half_a_file():
        yield b"half"
        assert (tmp_path / "a").read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as file:
        file.writelines(half_a_file())
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_of_writers_side_by_side_each_writes_a_whole_file(tmp_path):
    contents = [bytes([number]) * 2**18 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            list(threads.map(lambda data: write_file(tmp_path / "a", data), contents))
            assert (tmp_path / "a").read_bytes() in contents
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("said", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_has_files_all_the_same(tmp_path, monkeypatch, said):
    def no_folders(descriptor, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(said, "not supported")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_folder_whose_disk_fails_is_an_error(tmp_path, monkeypatch):
    def broken(descriptor, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "a", b"new")


def test_free_bytes_are_those_of_the_disk_on_which_a_folder_will_lie(tmp_path: Path) -> None:
    found = [free_on_disk(path) for path in (tmp_path, tmp_path / "not" / "there" / "yet")]
    assert found == pytest.approx([shutil.disk_usage(tmp_path).free] * 2, rel=0.1)
