"""Inputs: names, weights, and slices that together are the whole input, once."""

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
