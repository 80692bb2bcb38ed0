"""Reading documents: every kind of file, the same documents however it is sliced, and nothing left out in silence."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.corpus.counts import Counts
from pipeline.data.corpus.documents import Document, DocumentReader, Rules
from pipeline.data.corpus.inputs import input_files, parse_input, slices
from pipeline.data.errors import DataError


def read_counted(*arguments, slice_bytes=1 << 20, **rules):
    """The documents, and what the reader counted."""
    reader = DocumentReader(Rules(**rules))
    files = input_files([parse_input(str(argument)) for argument in arguments])
    sliced = slices(files, slice_bytes)
    documents = [document for spans in sliced for document in reader.read(spans)]
    assert reader.consumed == sum(span.size for spans in sliced for span in spans)
    assert len({(document.file, document.position) for document in documents}) == len(documents)
    return documents, reader.counts


def read(*arguments, **rules):
    return read_counted(*arguments, **rules)[0]


def texts(*arguments, **rules):
    return [document.text for document in read(*arguments, **rules)]


def test_folders_globs_and_files_are_read_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b\nsecond line")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c2", "id": 3}\n')
    (tmp_path / ".hidden.md").write_text("not read")
    texts = [document.text for document in read(tmp_path)]
    assert texts == ["a", "b\nsecond line", "c1", "c2"]
    assert read(f"prose={tmp_path / '*.txt'}") == [Document("a", "prose"), Document("b\nsecond line", "prose")]
    assert [document.text for document in read(tmp_path / "deep" / "c.jsonl", tmp_path / "a.txt")] == ["c1", "c2", "a"]


def test_a_link_back_to_a_folder_does_not_read_it_twice(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [document.text for document in read(tmp_path)] == ["one"]


def test_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n{"text": null}\n')
    documents, counts = read_counted(tmp_path)
    assert documents == [Document("b", "")]
    assert (counts.documents, counts.empty) == (1, 3)


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}')
    assert [document.text for document in read(tmp_path)] == ["word", "line"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "expected one JSON object a line"),
        ("[" * 100_000, "expected one JSON object a line"),
        ("[1]", "expected a JSON object, got list"),
        ('{"body": "b", "id": 1}', "no field 'text'; its fields are 'body', 'id'; .*--text-field"),
        ('{"text": 5}', "expected text in field 'text', got int"),
        (json.dumps({"text": "\ud800"}), "surrogate"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{message}"):
        read(path)


def test_another_text_field_may_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "b"}\n')
    assert read(tmp_path, text_field="body") == [Document("b", "")]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bytes_that_are_not_utf8_are_an_error_that_names_the_line(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: byte 0xff is not UTF-8"):
        read(tmp_path)


def test_a_suffix_that_cannot_be_read_is_an_error_that_lists_those_that_can(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.docx").write_text("b")
    with pytest.raises(DataError, match=r"b.docx.*\.txt, \.jsonl"):
        read(tmp_path)


def test_nothing_at_a_path_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere.txt", "*.jsonl", "empty"):
        with pytest.raises(DataError, match="no files at"):
            read(tmp_path / path)


LINES = [{"text": f"Zeile {n}: é€😀 {'x' * (n * 7 % 40)}", "id": n} for n in range(40)] + [{"text": " "}]
TEXTS = [line["text"] for line in LINES[:-1]]


def as_json_lines(lines=LINES):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


@pytest.fixture(scope="session")
def lines_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_bytes(as_json_lines().replace(b"\n", b"\n\n", 3).removesuffix(b"\n"))
    return path


@given(slice_bytes=st.integers(1, 400))
def test_a_jsonl_gives_the_same_documents_however_it_is_cut(lines_file, slice_bytes):
    whole, counts = read_counted(lines_file)
    cut, cut_counts = read_counted(lines_file, slice_bytes=slice_bytes)
    assert [document.text for document in cut] == TEXTS
    assert [document.position for document in cut] == [document.position for document in whole]
    assert cut_counts == counts


def test_a_bad_line_has_its_number_however_the_file_is_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_json_lines() + b"{broken\n")
    for slice_bytes in (1 << 20, 100, 1):
        with pytest.raises(DataError, match=r"a\.jsonl, line 42: expected one JSON object a line"):
            read(path, slice_bytes=slice_bytes)


def test_gzipped_lines_are_lines(tmp_path):
    data = as_json_lines()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    assert texts(tmp_path / "a.jsonl.gz", slice_bytes=10) == TEXTS


def test_zstandard_lines_are_lines(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data, compress = as_json_lines(), zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(data[:500]) + compress(data[500:]))
    assert texts(tmp_path / "a.jsonl.zst", slice_bytes=10) == TEXTS


def test_zstandard_with_the_longest_window_is_read(tmp_path):
    """As `zstd --long=31` makes it, and so the public dumps of Reddit are."""
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(as_json_lines()) + compressor.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 1 << 31
    assert texts(tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_is_cut_or_damaged_is_an_error_and_not_the_end(tmp_path, suffix):
    data = as_json_lines([{"text": f"{n} {n * n * n}"} for n in range(3000)])
    if suffix == ".jsonl.zst":
        data = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    else:
        data = gzip.compress(data)
    path = tmp_path / f"a{suffix}"
    for damaged in (data[:-1], data[: len(data) // 2], data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl.* is damaged: |expected one JSON|not UTF-8"):
            read(path)


def write_parquet(path, column, **options):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(column))), "text": column}), path, **options)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "string_view", "binary_view"])
def test_rows_of_a_parquet_are_documents_however_it_is_cut(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    column = [*TEXTS, None, ""]
    if kind == "dictionary":
        array = pyarrow.array(column).dictionary_encode()
    else:
        array = pyarrow.array(
            [c if c is None or "binary" not in kind else c.encode() for c in column], getattr(pyarrow, kind)()
        )
    write_parquet(tmp_path / "a.parquet", array, row_group_size=7)
    assert len(slices(input_files([parse_input(str(tmp_path))]), 1)) == 6
    for slice_bytes in (1 << 20, 1000, 1):
        documents, counts = read_counted(tmp_path, slice_bytes=slice_bytes)
        assert [document.text for document in documents] == TEXTS
        assert [document.position for document in documents] == list(range(40))
        assert counts.empty == 2


def test_a_column_of_nulls_has_empty_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", [None, None])
    write_parquet(tmp_path / "b.parquet", ["text", None])
    documents, counts = read_counted(tmp_path)
    assert [document.text for document in documents] == ["text"]
    assert counts.empty == 3


def test_a_parquet_without_the_column_or_with_numbers_in_it_or_damaged_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [1, 2])
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; its columns are 'id', 'text'; .*--text-field"):
        read(path, text_field="body")
    with pytest.raises(DataError, match=r"a\.parquet: expected text in column 'text', got int64"):
        read(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file"):
        read(path)


def test_a_value_of_a_parquet_that_is_not_utf8_is_undecodable(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", pyarrow.array([b"good", b"\xff", b"long" * 9], pyarrow.binary()))
    documents, counts = read_counted(tmp_path, on_undecodable="skip", max_document_bytes=30)
    assert [document.text for document in documents] == ["good"]
    assert (counts.undecodable, counts.oversized) == (1, 1)
    assert counts.notes[0].endswith("a.parquet, row 1: byte 0xff is not UTF-8 (invalid start byte)")


@pytest.mark.filterwarnings("ignore")  # of dill, which datasets uses to name what it makes
def test_a_folder_of_the_datasets_library_is_read_by_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    # Named by hand: some versions of datasets and pyarrow cannot hash a table in memory.
    table = datasets.table.InMemoryTable.from_pydict({"text": [*TEXTS, None], "id": list(range(41))})
    data = datasets.Dataset(table, fingerprint="texts")
    data.select(list(range(40, -1, -1))).save_to_disk(tmp_path / "set")
    for slice_bytes in (1 << 20, 500):
        documents, counts = read_counted(f"hf:{tmp_path / 'set'}", slice_bytes=slice_bytes)
        assert [document.text for document in documents] == TEXTS[::-1]
        assert counts.empty == 1
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "sets")
    assert texts(f"hf:{tmp_path / 'sets' / 'train'}") == TEXTS
    with pytest.raises(DataError, match=r"expected text in column 'id', got int64"):
        read(f"hf:{tmp_path / 'set'}", text_field="id")
    with pytest.raises(DataError, match=r"several splits: name one of them, hf:.*{train}"):
        read(f"hf:{tmp_path / 'sets'}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "format", [{"type": "arrow"}, {"type": "torch"}, {"type": "pandas"}, {"type": None, "columns": ["id"]}]
)
def test_a_format_that_was_saved_with_a_folder_of_the_datasets_library_changes_nothing(tmp_path, format):
    datasets = pytest.importorskip("datasets")
    if format["type"] == "pandas":
        pytest.importorskip("pandas")
    table = datasets.table.InMemoryTable.from_pydict({"text": [*TEXTS, None], "id": list(range(41))})
    datasets.Dataset(table, fingerprint="texts").with_format(**format).save_to_disk(tmp_path / "set")
    assert texts(f"hf:{tmp_path / 'set'}") == TEXTS


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_the_datasets_library_may_have_views_and_nulls(tmp_path):
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    for name, column in (("views", pyarrow.array(["a", None], pyarrow.string_view())), ("nulls", pyarrow.nulls(2))):
        table = datasets.table.InMemoryTable(pyarrow.table({"text": column}))
        datasets.Dataset(table, fingerprint=name).save_to_disk(tmp_path / name)
        documents, counts = read_counted(f"hf:{tmp_path / name}")
        assert (len(documents), counts.empty) == ((1, 1) if name == "views" else (0, 2))


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_of_the_datasets_library_is_an_error_that_says_what_is_wrong(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"text": TEXTS})
    for name, content, message in (
        ("data-00000-of-00001.arrow", LFS_POINTER, r"00001\.arrow is a pointer of Git LFS and not the file itself"),
        ("dataset_info.json", b"<html>502</html>", r"dataset_info\.json is a page of HTML or XML"),
        ("state.json", b"[]", r"^hf:.* cannot be read by datasets: .*; copy it again$"),
    ):
        datasets.Dataset(table, fingerprint="texts").save_to_disk(tmp_path / name)
        (tmp_path / name / name).unlink()
        (tmp_path / name / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(f"hf:{tmp_path / name}")


@pytest.mark.filterwarnings("ignore")
def test_a_row_of_the_datasets_library_that_is_not_utf8_is_undecodable(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"text": [f"text {number:03d}" for number in range(300)]})
    datasets.Dataset(table, fingerprint="texts").save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    data = file.read_bytes().replace(b"text 123", b"te\xfft 123")
    file.unlink()
    file.write_bytes(data)
    documents, counts = read_counted(f"hf:{tmp_path / 'set'}", on_undecodable="skip")
    assert (len(documents), counts.undecodable) == (299, 1)
    assert counts.notes == [f"{tmp_path / 'set'}, row 123: byte 2 of the text is not UTF-8 (invalid start byte)"]


def test_a_folder_that_datasets_did_not_write_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"save_to_disk at .*, but it has no state\.json"):
        read(f"hf:{tmp_path}")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_tar_is_a_document_a_key_its_text_before_its_json(tmp_path):
    members = [
        ("0001.json", b'{"text": "caption"}'),
        ("0001.txt", b"text"),
        ("0001.jpg", b"\xff\xd8"),
        ("a/0002.json", b'{"text": "from json"}'),
        ("a/0003.txt", b"third"),
        ("b/0003.txt", b"fourth"),
        ("b/0004.cls", b"7"),
        ("b/0005.txt", b"fifth"),
        ("b/0005.json", b'{"text": "of the fifth"}'),
    ]
    write_tar(tmp_path / "a.tar", members)
    documents, counts = read_counted(tmp_path / "a.tar")
    assert [document.text for document in documents] == ["text", "from json", "third", "fourth", "fifth"]
    assert (counts.documents, counts.ignored) == (5, 2)
    assert counts.notes[0].endswith("a.tar, member 0001.jpg: neither .txt nor .json")


def test_members_of_a_key_need_not_follow_each_other(tmp_path):
    members = [
        ("b.json", b'{"text": "of b"}'),
        ("a.json", b"{}"),
        ("a.txt", b"a"),
        ("c.json", b'{"text": "c"}'),
        ("b.txt", b"b"),
    ]
    write_tar(tmp_path / "a.tar", members)
    documents, counts = read_counted(tmp_path)
    assert [document.text for document in documents] == ["a", "c", "b"]
    assert counts == Counts(documents=3)


def test_names_with_dots_and_suffixes_in_capitals_are_documents(tmp_path):
    names = ["en.wikipedia.org_1.txt", "en.wikipedia.org_2.txt", "v1.5/A.TXT", "v1.5/b.JSON", "v1.5/Track 2.0 (Clean).json"]
    write_tar(tmp_path / "a.tar", [(name, json.dumps({"text": name}).encode()) for name in names])
    documents, counts = read_counted(tmp_path)
    assert (len(documents), counts.ignored) == (5, 0)
    assert [document.text for document in documents[3:]] == names[3:]
    (tmp_path / "a.tar").rename(tmp_path / "A.TAR")
    assert read(tmp_path) == documents


def test_what_describes_a_document_is_none_and_every_reason_is_true(tmp_path):
    members = [
        ("1.meta.json", b'{"text": "of the first"}'),
        ("1.txt", b"first"),
        ("2.json", b'{"text": "second"}'),
        ("2.mp4.json", b'{"text": "of the second"}'),
        ("._1.txt", b"of a Mac"),
        ("1.jpg", b"\xff"),
        ("1.TXT", b"first again"),
    ]
    write_tar(tmp_path / "a.tar", members)
    documents, counts = read_counted(tmp_path)
    assert [document.text for document in documents] == ["second", "first again"]
    assert counts.ignored == 5
    reasons = dict(note.removeprefix(f"{tmp_path}/a.tar, member ").split(": ") for note in counts.notes)
    assert reasons == {
        "._1.txt": "its name begins with a dot",
        "1.jpg": "neither .txt nor .json",
        "1.txt": "1.TXT has its key, and is taken",
        "1.meta.json": "it belongs to the key 1, which has a text",
        "2.mp4.json": "it belongs to the key 2, which has a text",
    }


def test_of_a_name_that_is_there_twice_the_last_one_is_taken_and_the_other_counted(tmp_path):
    """As `tar -x` does, after `tar -r`."""
    for between in ([], [("b.txt", b"b")]):
        write_tar(tmp_path / "a.tar", [("a.txt", b"old"), *between, ("a.txt", b"new"), ("a.json", b"{}"), ("a.json", b"{}")])
        documents, counts = read_counted(tmp_path)
        assert sorted(document.text for document in documents) == sorted(["new", *(data.decode() for _, data in between)])
        assert counts.ignored == 2
        assert counts.notes[0].endswith("a.tar, member a.txt: a later member has its name, and is taken")


def test_a_hard_link_in_a_tar_is_another_name_of_its_member(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, link in (("a.txt", ""), ("again.txt", "a.txt"), ("b.dat", ""), ("b.txt", "b.dat"), ("b2.txt", "b.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE if link else tarfile.REGTYPE), link
            info.size = 0 if link else len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    documents, counts = read_counted(tmp_path)
    assert [document.text for document in documents] == ["a.txt", "b.dat"]
    assert [note.split(", member ")[1] for note in counts.notes] == [
        "b.dat: neither .txt nor .json",
        "again.txt: a hard link to a.txt, which is read",
        "b2.txt: a hard link to b.txt, which is read",
    ]
    assert counts.ignored == 3


def test_links_and_paths_in_a_tar_lead_nowhere(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "tars" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind in (("1.txt", tarfile.SYMTYPE), ("2.txt", tarfile.LNKTYPE), ("3.txt", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
        info = tarfile.TarInfo("../../4.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"read"))
    documents, counts = read_counted(path)
    assert [document.text for document in documents] == ["read"]
    assert counts.ignored == 3
    assert counts.notes[0].endswith("member 1.txt: a link or device, no file")
    assert counts.notes[1].endswith(f"member 2.txt: a hard link to {tmp_path}/secret.txt, which is not before it")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar", "secret.txt", "tars"]


def test_bad_and_large_members_of_a_tar_are_counted(tmp_path):
    members = [("1.txt", b"\xff"), ("2.txt", b"x" * 101), ("3.json", b"{"), ("4.txt", b""), ("5.txt", b"good")]
    write_tar(tmp_path / "a.tar", members)
    documents, counts = read_counted(tmp_path, on_undecodable="skip", max_document_bytes=100)
    assert [document.text for document in documents] == ["good"]
    assert (counts.undecodable, counts.oversized, counts.empty) == (2, 1, 1)


@pytest.mark.parametrize("on_undecodable", ["skip", "error"])
def test_undecodable_documents_are_counted_and_named_or_an_error(tmp_path, on_undecodable):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    lines = [b'{"text": "good"}', b"{'text': 1}", b'{"body": "b"}', b'{"text": 5}', b"[1]", b'{"text": "\\ud800"}', b"\xff"]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    if on_undecodable == "error":
        with pytest.raises(DataError, match=r"a\.txt: line 1: byte 0xe9 is not UTF-8 .*; .*--on-undecodable skip"):
            read(tmp_path, on_undecodable=on_undecodable)
        return
    documents, counts = read_counted(tmp_path, on_undecodable=on_undecodable)
    assert documents == [Document("good", "")]
    assert (counts.documents, counts.undecodable) == (1, 7)
    assert len(counts.notes) == 5
    assert counts.notes[2].endswith(
        "b.jsonl, line 3: no field 'text'; its fields are 'body'; name the right one with --text-field"
    )


def test_a_wrong_text_field_is_an_error_even_where_undecodable_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no field 'text'; .*--text-field"):
        read(tmp_path, on_undecodable="skip")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz"])
def test_oversized_documents_are_counted_and_what_follows_is_read(tmp_path, suffix):
    lines = [{"text": "before"}, {"text": "x" * 3_000_000}, {"text": "after"}]
    if suffix == ".txt":
        for number, line in enumerate(lines):
            (tmp_path / f"{number}.txt").write_text(line["text"])
    elif suffix == ".jsonl":
        (tmp_path / "a.jsonl").write_bytes(as_json_lines(lines))
    else:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_json_lines(lines)))
    documents, counts = read_counted(tmp_path, max_document_bytes=100)
    assert [document.text for document in documents] == ["before", "after"]
    assert (counts.documents, counts.oversized) == (2, 1)
    assert "more than 100 bytes" in counts.notes[0]


def test_a_document_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 88}) + "\n" + json.dumps({"text": "z" * 89}) + "\n")
    documents, counts = read_counted(tmp_path, max_document_bytes=100)
    assert [document.text[0] for document in documents] == ["x", "y"]
    assert counts.oversized == 1


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_decompression_bomb_takes_no_memory(tmp_path, suffix):
    size = 1 << 28
    if suffix == ".jsonl.zst":
        compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    else:
        compressor = zlib.compressobj(1, wbits=31)
    chunks = [compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)] + [compressor.flush()]
    (tmp_path / f"bomb{suffix}").write_bytes(b"".join(chunks))
    documents, oversized, memory = memory_of_reading(tmp_path / f"bomb{suffix}")
    assert (documents, oversized) == (0, 1)
    assert memory < 100 << 20  # of 256 MiB


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_a_text_that_a_parquet_repeats_is_not_held_many_times(tmp_path, as_dictionary):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 250, pyarrow.int32()), ["x" * (1 << 23)])
    path, options = tmp_path / "a.parquet", {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30}
    parquet.write_table(pyarrow.table({"text": repeated}), path, store_schema=as_dictionary, **options)
    assert path.stat().st_size < 10_000
    documents, oversized, memory = memory_of_reading(path)
    assert (documents, oversized) == (0, 250)
    assert memory < 400 << 20  # of 2,000 MiB; pyarrow itself takes a hundred


def test_a_parquet_whose_footer_understates_its_sizes_is_not_held_whole(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, text = tmp_path / "a.parquet", pyarrow.array(["x" * (1 << 23)])
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_batch_size": 1}
    parquet.write_table(pyarrow.table({"text": pyarrow.chunked_array([text] * 120)}), path, **options)  # a page each
    stated = parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    assert parquet.ParquetFile(path).metadata.row_group(0).num_rows == 120
    data, integer = path.read_bytes(), thrift_integer(stated)
    path.write_bytes(data.replace(integer, thrift_integer(1000, size=len(integer))))
    assert parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 1000
    documents, oversized, memory = memory_of_reading(path)
    assert (documents, oversized) == (0, 120)
    assert memory < 400 << 20  # of 960 MiB; pyarrow itself takes a hundred


def thrift_integer(value, size=0):
    """As the footer of a parquet has it: 7 bits a byte, the last ones first, in at least `size` bytes."""
    value, data = 2 * value, []
    while value or len(data) < size:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data[:-1], data[-1] & 0x7F])


def memory_of_reading(path):
    """Documents, oversized ones, and by how many bytes reading them raised the peak of a process's memory."""
    script = (
        "import sys; from tests.peak_memory import peak_memory;"
        "from pipeline.data.corpus.documents import DocumentReader, Rules;"
        "from pipeline.data.corpus.inputs import input_files, parse_input, slices;"
        "reader = DocumentReader(Rules(max_document_bytes=1 << 20));"
        "before = peak_memory();"
        "documents = [d for s in slices(input_files([parse_input(sys.argv[1])]), 1 << 20) for d in reader.read(s)];"
        "print(len(documents), reader.counts.oversized);"
        "print(peak_memory() - before)"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=Path(__file__).parents[2])
    documents, oversized, memory = map(int, done.stdout.split())
    return documents, oversized, memory


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html><body>503</body></html>\n" * 9, "is a page of HTML or XML, such as a server's error"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a page of HTML or XML, .*; download it again"),
    ],
)
def test_a_file_that_is_something_else_is_an_error_that_names_the_file(tmp_path, suffix, content, message):
    pytest.importorskip({".jsonl.zst": "zstandard", ".parquet": "pyarrow"}.get(suffix, "json"))
    (tmp_path / f"a{suffix}").write_bytes(content)
    if suffix == ".txt" and b"<" in content:
        assert len(read(tmp_path)) == 1
        return
    with pytest.raises(DataError, match=rf"^{tmp_path}/a{suffix} {message}"):
        read(tmp_path, on_undecodable="skip")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl.gz", as_json_lines(), "plain JSON"),  # as a client leaves it that decompresses by itself
        ("a.jsonl.gz", b"PAR1", "a parquet file"),
        ("a.jsonl", gzip.compress(as_json_lines()), "compressed by gzip"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "text in UTF-16"),
        ("a.tar", as_json_lines(), "plain JSON"),
    ],
)
def test_a_file_under_a_wrong_name_is_an_error_that_says_what_it_is(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{name} is {what}, and not what its suffix says; convert it or give it its right name"
    ):
        read(tmp_path, on_undecodable="skip")


@pytest.mark.parametrize("name", ["A.JSONL.GZ", "A.PARQUET"])
def test_a_damaged_file_with_a_suffix_in_capitals_is_not_called_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(as_json_lines())[:-9] if name.endswith("GZ") else b"PAR1" + b"." * 50)
    with pytest.raises(DataError, match=rf"{name} is (damaged|not a parquet file that can be read): "):
        read(tmp_path)


@pytest.mark.parametrize("slice_bytes", [1 << 20, 100])
def test_a_file_without_a_line_of_use_is_one_note_and_not_all_of_them(tmp_path, slice_bytes):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 20)
    (tmp_path / "b.jsonl").write_text("id,text\n" * 500)
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n{broken\n')
    counts = counted_by_slices(tmp_path, slice_bytes)
    assert (counts.documents, counts.undecodable) == (21, 501)
    assert "b.jsonl: 500 lines together cannot be used; the first, line 1: expected one JSON object a line" in counts.notes[0]
    assert "c.jsonl, line 2: expected one JSON object a line" in counts.notes[1]
    assert len(counts.notes) == 2


@pytest.mark.parametrize("slice_bytes", [1 << 20, 200, 64])
def test_lines_have_their_numbers_in_the_file_though_it_is_read_in_slices_by_many(lines_file, tmp_path, slice_bytes):
    bad = b"{broken\n" + as_json_lines()
    (tmp_path / "a.jsonl").write_bytes(bad * 2)
    counts = counted_by_slices(tmp_path, slice_bytes)
    assert [note.split(": ")[0] for note in counts.notes] == [f"{tmp_path}/a.jsonl, line {line}" for line in (1, 43)]


def test_a_line_behind_what_others_read_is_named_by_its_byte(tmp_path):
    good = '{"text": "0123456789"}\n' * 100
    (tmp_path / "a.jsonl").write_text(good + "{broken\n" + good)
    (note,) = counted_by_slices(tmp_path, 320, step=2).notes + counted_by_slices(tmp_path, 320, first=1, step=2).notes
    assert note.startswith(f"{tmp_path}/a.jsonl, the line at byte {len(good):,}: expected one JSON object a line")


def counted_by_slices(path, slice_bytes, first=0, step=1):
    """What readers of their own count in every `step`-th slice, added up."""
    counts = Counts()
    for spans in slices(input_files([parse_input(str(path))]), slice_bytes)[first::step]:
        reader = DocumentReader(Rules(on_undecodable="skip"))
        for _ in reader.read(spans):
            pass
        counts.add(Counts.from_json(json.loads(json.dumps(asdict(reader.counts)))))
    return counts
