"""Verifying finds all damage; inspecting shows what is there."""

import json
import shutil

import numpy as np
import pytest

from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import prepare
from pipeline.data.errors import DataError
from pipeline.data.shards.inspection import inspect
from pipeline.data.shards.manifest import MANIFEST_FILE, read_manifest
from pipeline.data.shards.verification import verify
from pipeline.data.tokenizer import byte_tokenizer, train_bpe

TEXTS = {"prose": [f"prose {n} " + "abc " * n for n in range(20)], "web": [f"web {n}\x1b[31m" for n in range(20)]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verified") / "data"
    documents = [Document(text, source) for source, texts in TEXTS.items() for text in texts]
    prepare(documents, directory, byte_tokenizer(), 32, seed=0, source_names=list(TEXTS), samples_per_shard=10)
    return directory


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def edit(folder, change):
    path = folder / MANIFEST_FILE
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_whole_folder_has_no_problems(folder):
    seen = []
    assert verify(folder, seen.append) == []
    assert [shard.name for shard in seen] == [f"shard-{n:05d}" for n in range(4)]


def test_damage_is_found_in_every_shard_that_has_some(folder):
    offsets = np.fromfile(folder / "shard-00001.tar.idx", "<u8").tolist()
    for name, offset in (("shard-00001", offsets[3] + 600), ("shard-00003", 5)):
        data = bytearray((folder / f"{name}.tar").read_bytes())
        data[offset] ^= 1
        (folder / f"{name}.tar").write_bytes(data)
    problems = verify(folder)
    assert len(problems) == 4
    assert problems[0].startswith("shard shard-00001: the sha256 of its tar is ")
    assert problems[1].startswith("shard shard-00001, sample 3, ")
    assert problems[2].startswith("shard shard-00003: the sha256 of its tar is ")
    assert problems[3].startswith("shard shard-00003, sample 0, ")


def test_of_many_damaged_samples_the_first_are_named_and_the_rest_counted(folder):
    data = bytearray((folder / "shard-00000.tar").read_bytes())
    for offset in np.fromfile(folder / "shard-00000.tar.idx", "<u8").tolist()[:-1]:
        data[offset + 600] ^= 1
    (folder / "shard-00000.tar").write_bytes(data)
    problems = verify(folder)
    assert [problem.partition(" in ")[0] for problem in problems[1:6]] == [f"shard shard-00000, sample {n}," for n in range(5)]
    assert problems[6:] == ["shard shard-00000: 5 samples more are damaged"]


def test_a_flipped_bit_in_the_padding_at_the_end_is_found(folder):
    data = bytearray((folder / "shard-00002.tar").read_bytes())
    data[-1] ^= 1
    (folder / "shard-00002.tar").write_bytes(data)
    (problem,) = verify(folder)
    assert problem.startswith("shard shard-00002: the sha256")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][2].update(tokens=5), "shard shard-00002: it has 320 tokens, expected 5"),
        (lambda m: m["sources"][1].update(tokens=7), "source web: the shards have 230 of its tokens, expected 7"),
        (lambda m: m["sources"][0].update(documents=7), "source prose: the shards have 20 of its documents, expected 7"),
        (lambda m: m["shards"].pop(), "shard-00003.tar is not in the manifest"),
        (lambda m: m.update(tokenizer_sha256="0" * 64), "tokenizer.json is not the tokenizer that the manifest names"),
    ],
)
def test_a_count_that_is_wrong_is_found(folder, change, message):
    edit(folder, change)
    assert any(message in problem for problem in verify(folder)), verify(folder)


def test_another_tokenizer_is_found(folder):
    train_bpe(["other"], 257).save(str(folder / "tokenizer.json"))
    (problem,) = verify(folder)
    assert "is not the tokenizer" in problem


def test_swapped_shards_are_found(folder):
    for suffix in (".tar", ".tar.idx", ".tar.crc32"):
        one, two = (folder / f"shard-0000{n}{suffix}" for n in (1, 2))
        one.rename(folder / "spare")
        two.rename(one)
        (folder / "spare").rename(two)
    problems = verify(folder)
    assert [problem.partition(":")[0] for problem in problems] == ["shard shard-00001"] * 2 + ["shard shard-00002"] * 2
    assert "the shard was exchanged for another" in problems[1]


def test_of_checksums_that_are_partly_wrong_the_rest_is_looked_at_all_the_same(tmp_path):
    documents = [Document("x" * 2111, "")]
    prepare(documents, tmp_path / "data", byte_tokenizer(), 2, seed=0, samples_per_shard=2000)
    for name, at in (("crc32", 3), ("idx", 8 * 1040)):
        path = tmp_path / "data" / f"shard-00000.tar.{name}"
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    wrong, before, behind = verify(tmp_path / "data")
    assert "its .crc32 is not the one that the manifest means, at samples 0 to 1,023: the file is damaged" in wrong
    assert (before.partition(" in ")[0], behind.partition(" in ")[0]) == tuple(
        f"shard shard-00000, sample {sample}," for sample in (1039, 1040)
    )


@pytest.mark.parametrize("suffix", ["tar", "tar.idx", "tar.crc32"])
def test_a_file_that_the_machine_cannot_read_is_no_damage_and_hides_none(folder, suffix):
    (folder / "shard-00000.tar.idx").unlink()
    file = folder / f"shard-00001.{suffix}"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # a file whose first bytes are an input/output error
    with pytest.raises(
        DataError, match=r"cannot be read: Input/output error; the machine is at fault and not the data"
    ) as told:
        verify(folder)
    assert "\nfound before that: shard shard-00000: " in str(told.value)
    (folder / "shard-00000.tar.idx").write_bytes(bytes(88))
    file.unlink()
    file.symlink_to(file.name)
    for look in (verify, read_manifest):
        with pytest.raises(DataError, match=rf"{file.name} cannot be read: Too many levels .*the machine is at fault"):
            look(folder)


def test_every_file_that_is_cut_or_missing_is_found(folder):
    last = read_manifest(folder).shards[3].samples - 1
    for name in ("shard-00000.tar", "shard-00003.tar", "shard-00003.tar.idx"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    (folder / "shard-00001.tar.idx").unlink()
    (folder / "shard-00002.tar").unlink()
    (folder / "tokenizer.json").unlink()
    problems = verify(folder)
    expected = [
        "tokenizer.json",
        "shard-00000.tar has 40959 bytes, expected 40960",
        "shard shard-00000: the sha256 of its tar is ",
        "shard-00001.tar.idx cannot be found",
        "shard-00002.tar cannot be found",
        "shard-00003.tar has ",
        "shard-00003.tar.idx has ",
        "shard shard-00003: the sha256 of its tar is ",
    ]
    for text, problem in zip(expected, problems, strict=False):
        assert text in problem
    assert [problem.partition(", in ")[0] for problem in problems[len(expected) :]] == [f"shard shard-00003, sample {last}"]


def test_a_folder_without_a_manifest_is_an_error(folder):
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"expected manifest\.json"):
        verify(folder)


def test_inspecting_shows_totals_lengths_and_rows_with_their_documents(prepared):
    lines = list(inspect(prepared, num_rows=1000))
    tokens = sum(len(text.encode()) + 1 for texts in TEXTS.values() for text in texts)
    num_rows = -(-tokens // 32)
    assert lines[0].startswith(f"{prepared}: {tokens:,} tokens in {num_rows} rows of 32, 4 shard(s), ")
    assert lines[1].startswith(f"padding {num_rows * 32 - tokens} positions")
    assert lines[3].startswith("source web: 20 documents, 230 tokens")
    shown = "".join(line.strip()[1:-1] for line in lines if line.startswith("    '"))
    documents = shown.replace("<|endoftext|>", "\n").split("\n")
    assert sorted(documents) == sorted(["", *(repr(text)[1:-1] for texts in TEXTS.values() for text in texts)])
    assert all(character.isprintable() for line in lines for character in line)
    pieces = [line for line in lines if line.startswith("  document ")]
    assert sum(line.endswith("ends:") for line in pieces) == 40
    counted = [int(line.split()[3].replace(",", "")) for line in lines if " to " in line and line.split()[1] == "to"]
    assert sum(counted) == len(pieces)
    spans = [line.split()[:3] for line in lines if line.split()[1:2] == ["to"]]
    assert spans == [
        ["1", "to", "1"],
        ["2", "to", "3"],
        ["4", "to", "7"],
        ["8", "to", "15"],
        ["16", "to", "31"],
        ["32", "to", "32"],
    ]
    assert sum(" of web, " in line and line.endswith("ends:") for line in pieces) == 20
    rows = [line.partition(":")[0] for line in lines if line.startswith("row ")]
    assert rows == [f"row shard-{n // 10:05d}/{n:09d}" for n in range(num_rows)]
