"""Two that write to one output: whoever comes second is refused, whichever two they are."""

import fcntl
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from pipeline.data.corpus.inputs import Input
from pipeline.data.corpus.prepare import PrepareSettings, prepare
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.merging import merge
from pipeline.data.shards.output_folder import atomic_folder, locked
from pipeline.data.shards.verification import verify
from pipeline.data.tokenizer import byte_tokenizer
from tests.data_sets import numbered_data

T = 8


@pytest.fixture
def parts(tmp_path):
    return [numbered_data(tmp_path / f"part{number}", 5, first=10 * number) for number in range(2)]


def prepare_at(output, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(20)))
    return prepare_files([Input("", str(tmp_path / "a.jsonl"))], output, byte_tokenizer(), PrepareSettings(T))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_who_comes_while_another_merges_is_refused_and_harms_nothing(tmp_path, parts):
    output = tmp_path / "out"
    with atomic_folder(output) as partial:
        (partial / "shard-00000.tar").write_bytes(b"half")
        before = contents(partial)
        for second in (
            lambda: prepare_at(output, tmp_path),
            lambda: merge(parts, output),
            lambda: prepare([], output, byte_tokenizer(), T, seed=0),
        ):
            with pytest.raises(DataError, match=r"another process is writing to .*out\.partial; wait for it, or stop it"):
                second()
            assert contents(partial) == before
    assert contents(output) == {"shard-00000.tar": b"half"}
    assert not partial.exists()


def test_what_was_merged_has_no_lock_in_it_and_is_not_overwritten(tmp_path, parts):
    merge(parts, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "shard" not in path.name) == [
        "manifest.json",
        "tokenizer.json",
    ]
    with pytest.raises(DataError, match="exists already"):
        merge(parts, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_no_command_of_ours_left_is_nobodys_to_remove(tmp_path, parts):
    output = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    for command in (
        lambda: prepare_at(output, tmp_path),
        lambda: merge(parts, output),
        lambda: prepare([], output, byte_tokenizer(), T, seed=0),
    ):
        with pytest.raises(DataError, match=r"out\.partial holds files that no interrupted command left there; move it away"):
            command()
        assert contents(tmp_path / "out.partial") == {"thesis.txt": b"mine"}
    (tmp_path / "out.partial").rename(tmp_path / "mine")
    prepare_at(output, tmp_path)
    (tmp_path / "mine").rename(tmp_path / "out.partial")
    assert prepare_at(output, tmp_path).was_complete
    assert contents(tmp_path / "out.partial") == {"thesis.txt": b"mine"}


def test_a_lock_that_was_removed_before_it_could_be_taken_is_none(tmp_path, monkeypatch):
    def removed_meanwhile(file, operation, flock=fcntl.flock):
        (tmp_path / "lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with pytest.raises(DataError, match=r"another process was writing to .* until now"), locked(tmp_path):
        pass
    with pytest.raises(DataError, match=r"another process was writing to .* until now"), locked(tmp_path / "gone"):
        pass


def test_merging_links_the_shards_where_it_can(tmp_path, parts):
    merge(parts, tmp_path / "out")
    for suffix in ("tar", "tar.idx", "tar.crc32"):
        assert (tmp_path / "out" / f"shard-00001.{suffix}").samefile(parts[1] / f"shard-00000.{suffix}")


def test_who_has_looked_just_before_another_was_done_overwrites_nothing(tmp_path, parts, monkeypatch):
    output, merged = tmp_path / "out", []

    def look(path, lexists=os.path.lexists):
        was_there = lexists(path)
        if path == output and not merged:
            merged.append(None)
            merge(parts, output)
            merged.append(contents(output))
        return was_there

    monkeypatch.setattr(os.path, "lexists", look)
    with pytest.raises(DataError, match="exists already; remove it"):
        merge(parts[:1], output)
    assert contents(output) == merged[1]


def die_while_merging(output):
    with atomic_folder(output) as partial:
        (partial / "shard-00007.tar").write_bytes(b"half")
        os._exit(9)


def test_what_a_killed_merge_left_is_in_nobodys_way(tmp_path, parts):
    def left(output):
        process = multiprocessing.get_context("spawn").Process(target=die_while_merging, args=(output,))
        process.start()
        process.join()
        assert process.exitcode == 9
        assert (tmp_path / f"{output.name}.partial" / "shard-00007.tar").exists()
        return output

    merge(parts, left(tmp_path / "merged"))
    prepare_at(left(tmp_path / "prepared"), tmp_path)
    assert verify(tmp_path / "prepared") == []
    for name in ("merged", "prepared"):
        assert not (tmp_path / name / "shard-00007.tar").exists()
        assert not (tmp_path / f"{name}.partial").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, parts, exists):
    """As to a disk with room, and so perhaps on another file system than the link."""
    for name, command in (
        ("prepared", lambda output: prepare_at(output, tmp_path)),
        ("merged", lambda output: merge(parts, output)),
    ):
        place = tmp_path / "disk" / name
        place.mkdir(parents=True) if exists else place.parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(place)
        command(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert read_manifest(place).num_samples > 0
        assert not list(place.parent.glob("*.partial"))
    assert prepare_at(tmp_path / "prepared", tmp_path).was_complete


def test_what_cannot_be_renamed_to_is_refused_before_anything_is_written(tmp_path, parts):
    """A mount point; on Linux /dev/shm is one, and where it is not empty so is the error another one."""
    with pytest.raises(
        DataError, match=r"/dev/shm (is a mount point, .* give a folder in it, such as /dev/shm/data|exists already)"
    ):
        merge(parts, Path("/dev/shm"))
    assert not Path("/dev/shm.partial").exists()


def test_an_unfinished_folder_on_another_file_system_is_refused_before_anything_is_written(tmp_path, parts):
    elsewhere = Path("/dev/shm")
    if elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        (tmp_path / "out.partial").symlink_to(folder)
        for command in (lambda: prepare_at(tmp_path / "out", tmp_path), lambda: merge(parts, tmp_path / "out")):
            with pytest.raises(DataError, match=r"out\.partial lies on another file system than the output"):
                command()
        assert list(Path(folder).iterdir()) == []
