"""Inputs: names, weights, files that are listed once, and slices that together are the whole input, once."""

import glob
import os
import shutil

import pytest

from pipeline.data.corpus.inputs import Input, input_files, parse_input, parse_weights, slice_size, slices, source_names
from pipeline.data.errors import DataError


def test_names_are_parsed_from_the_front_of_an_input():
    assert parse_input("prose=books/a=b") == Input("prose", "books/a=b")
    assert parse_input("books/*.txt") == Input("", "books/*.txt")
    assert parse_input("./a=b.txt") == Input("", "./a=b.txt")


def test_a_name_that_cannot_be_one_is_an_error_that_says_what_names_are_made_of(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for argument, name in ((f"w x={tmp_path}/a.txt", "w x"), ("pro.se=*.txt", "pro.se")):
        with pytest.raises(
            DataError, match=rf"no files at .*; '{name}' is no name for a source, which has letters, digits, _ and"
        ):
            input_files([parse_input(argument)])
    for argument in ("prose=nowhere=1", "nowhere.txt"):
        with pytest.raises(DataError, match=r"no files at 'nowhere.*or a glob that matches some$"):
            input_files([parse_input(argument)])


def test_sources_are_named_all_or_none():
    assert source_names([Input("web", "a"), Input("prose", "b"), Input("web", "c")]) == ["web", "prose"]
    assert source_names([Input("", "a"), Input("", "b")]) == []
    with pytest.raises(DataError, match="name all or none"):
        source_names([Input("web", "a"), Input("", "b")])


def test_weights_are_positive_numbers_of_named_sources():
    assert parse_weights(["web=2.5", "prose=0.1"], ["prose", "web"]) == {"web": 2.5, "prose": 0.1}
    for argument in ("web=0", "web=-1", "web=much", "web", "web=nan", "web=inf"):
        with pytest.raises(DataError, match=f"--weight {argument}: expected a number above 0"):
            parse_weights([argument], ["web"])
    with pytest.raises(DataError, match="there is no input named 'wbe'; the named inputs are prose, web"):
        parse_weights(["wbe=2"], ["prose", "web"])
    with pytest.raises(DataError, match="no input has a name"):
        parse_weights(["web=2"], [])
    with pytest.raises(DataError, match="has a weight already"):
        parse_weights(["web=2", "web=2"], ["web"])


@pytest.mark.parametrize("size", [1, 10, 64, 1000])
def test_slices_are_the_whole_input_once_in_its_order_and_about_of_the_size(tmp_path, size):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("x" * number)
        (tmp_path / f"{number}.jsonl").write_text("y" * (number * 30))
    files = input_files([Input("", str(tmp_path))])
    spans = [span for spans in slices(files, size) for span in spans]
    assert [span.file for span in spans] == sorted(span.file for span in spans)
    for number, file in enumerate(files):
        own = [span for span in spans if span.file == number]
        assert sum(span.size for span in own) == file.size
        assert [span.start for span in own[1:]] == [span.end for span in own[:-1]]
        if file.size:
            assert (own[0].start, own[-1].end) == (0, file.size)
    for spans in slices(files, size):
        assert len(spans) == 1 or sum(span.size for span in spans) <= size


def test_slices_are_small_for_a_small_input_and_bounded_for_a_large_one(tmp_path):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as empty:
        empty.truncate(100 << 30)
    (large,) = input_files([Input("", str(file))])
    assert slice_size([large]) == 1 << 25
    assert slice_size([]) == 1 << 16


def test_a_missing_library_is_an_error_that_names_the_extra(tmp_path):
    """In a Python where nothing but the standard library and this package's own requirements is to be found."""
    from pipeline.data.corpus.columns import require

    with pytest.raises(DataError, match=r"reading .parquet needs no_such_module: pip install 'selective-mtp\[corpora\]'"):
        require("no_such_module.parquet", "corpora", "reading .parquet")


@pytest.fixture
def linked(tmp_path):
    """Four files in three folders, to which many more names lead: links to files and folders, two of them back, a hard link."""
    folder = tmp_path / "in"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "other").mkdir()
    for name in ("2024.jsonl", "deep/a.jsonl", "deep/deeper/b.jsonl", "other/c.jsonl"):
        (folder / name).write_text(f'{{"text": "{name}"}}\n')
    (folder / "latest.jsonl").symlink_to("2024.jsonl")
    (folder / "other" / "hard.jsonl").hardlink_to(folder / "deep" / "a.jsonl")
    (folder / "deep" / "back").symlink_to(folder)
    (folder / "deep" / "deeper" / "back").symlink_to(folder)
    (folder / "zlink").symlink_to(folder / "deep")
    return folder


@pytest.mark.parametrize(
    "patterns", [[""], ["**"], ["**/*"], ["**/*.jsonl"], ["*", "**/"], ["", "deep/", "other/**", "latest.jsonl"]]
)
def test_a_file_is_listed_once_whatever_names_lead_to_it(linked, patterns):
    files = input_files([Input("", os.path.join(linked, pattern)) for pattern in patterns])
    names = [os.path.relpath(file.path, linked) for file in files]
    assert sorted(os.path.basename(name) for name in names) == ["2024.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"]
    assert sum(file.names for file in files) > len(files)
    shutil.copy(linked / "2024.jsonl", linked / "copy.jsonl")
    assert len(input_files([Input("", str(linked))])) == 5


def test_a_file_belongs_to_the_first_of_its_names_in_the_order_of_the_inputs(linked):
    first = [Input("", str(linked / "latest.jsonl")), Input("", str(linked))]
    assert input_files(first)[0].path == str(linked / "latest.jsonl")
    assert input_files(first[::-1])[0].path == str(linked / "2024.jsonl")


@pytest.mark.parametrize("shared", ["2024.jsonl", "latest.jsonl", "other/hard.jsonl"])
def test_two_sources_that_share_a_file_are_an_error_that_names_both(linked, shared):
    inputs = [Input("web", str(linked / "**")), Input("prose", str(linked / shared))]
    with pytest.raises(DataError, match=rf"the inputs 'web' and 'prose' share a file: .*\.jsonl and .*{shared} are the same"):
        input_files(inputs)


def test_one_file_cannot_be_of_two_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl and .*b\.txt are the same file, so it cannot be both"):
        input_files([Input("", str(tmp_path))])


@pytest.mark.parametrize("pattern", ["**", "**/", "**/*.txt", "*/**/*.txt", "a/**/b/**", "**/b/*", "[ab]/**/?.txt", "**/**/*"])
def test_a_glob_finds_the_files_that_pythons_own_finds(tmp_path, monkeypatch, pattern):
    for folder in ("", "a", "b", "a/b", "a/b/b", "a/[b]", ".hidden"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("x.txt", "y.txt", ".z.txt"):
            (tmp_path / folder / name).write_text("text")
    found = glob.glob(str(tmp_path / pattern), recursive=True)
    everything = [os.path.join(parent, name) for parent, _, names in os.walk(tmp_path) for name in names if name[0] != "."]
    below = {file for file in everything if any(file == match or file.startswith(os.path.join(match, "")) for match in found)}
    files = input_files([Input("", str(tmp_path / pattern))])
    assert {file.path for file in files} == below - {file for file in below if "/." in file}
    monkeypatch.chdir(tmp_path)
    assert [str(tmp_path / file.path) for file in input_files([Input("", pattern)])] == [file.path for file in files]


def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")

    def refusing(path, scandir=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot read .*closed: Permission denied"):
        input_files([Input("", str(tmp_path))])


@pytest.mark.parametrize(
    ("pattern", "is_read"),
    [("*/a.txt", False), ("[c]*/*.txt", False), ("closed/*", False), ("*/**", False), ("**/*.txt", False), ("open/*", True)],
)
def test_a_glob_that_cannot_look_into_a_folder_is_an_error(tmp_path, monkeypatch, pattern, is_read):
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")

    def listing(path, scandir=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    # root may look into every folder
    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed"))
    if is_read:
        assert len(input_files([Input("", str(tmp_path / pattern))])) == 1
        return
    with pytest.raises(DataError, match=r"cannot read .*closed: Permission denied"):
        input_files([Input("", str(tmp_path / pattern))])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: it is a pipe or device, and no file"):
        input_files([Input("", str(tmp_path))])


def test_what_is_written_is_no_input(tmp_path):
    for name in ("a.jsonl", "out/b.jsonl", "out.partial/data/c.jsonl", "outer/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    written = (tmp_path / "out", tmp_path / "out.partial")
    for pattern in ("", "**", "**/*.jsonl"):
        files = input_files([Input("", str(tmp_path / pattern))], written)
        assert [os.path.relpath(file.path, tmp_path) for file in files] == ["a.jsonl", "outer/d.jsonl"]
    with pytest.raises(DataError, match=r"all files at .*out.partial.* lie in .*out, the output"):
        input_files([Input("", str(tmp_path / "out.partial"))], written)
