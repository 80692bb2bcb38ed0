"""Reading documents: which files, in which order, and what is wrong with those that cannot be read."""

import json

import pytest

from pipeline.data.documents import Document, DocumentReader, Rules, read_inputs
from pipeline.data.inputs import Input, input_files, parse_input, slices, source_names
from pipeline.data.manifest import DataError


def read(*arguments, text_field="text"):
    return list(DocumentReader([parse_input(str(argument)) for argument in arguments], text_field))


def test_names_are_parsed_from_the_front_of_an_input():
    assert parse_input("prose=books/a=b") == Input("prose", "books/a=b")
    assert parse_input("books/*.txt") == Input("", "books/*.txt")
    assert parse_input("./a=b.txt") == Input("", "./a=b.txt")


def test_sources_are_named_all_or_none():
    assert source_names([Input("web", "a"), Input("prose", "b"), Input("web", "c")]) == ["web", "prose"]
    assert source_names([Input("", "a"), Input("", "b")]) == []
    with pytest.raises(DataError, match="name all or none"):
        source_names([Input("web", "a"), Input("", "b")])


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
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n')
    reader = DocumentReader([Input("", str(tmp_path))])
    for _ in range(2):
        assert [document.text for document in reader] == ["b"]
        assert (reader.num_documents, reader.num_empty) == (1, 2)


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
    (tmp_path / "b.parquet").write_text("b")
    with pytest.raises(DataError, match=r"b.parquet.*\.txt, \.jsonl"):
        read(tmp_path)


def test_nothing_at_a_path_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere.txt", "*.jsonl", "empty"):
        with pytest.raises(DataError, match="no files at"):
            read(tmp_path / path)
