"""The coloured passage: its marks, its colours, and that it shows text as text."""

import re

import pytest

from pipeline.report.colours import COLOURS
from pipeline.report.passage_page import COLUMNS, Mark, Passage, _placed, passage_html, passage_png

MARKS = [
    [None, Mark(True, 2.0), Mark(False, -2.0)],
    [None, None, Mark(True, -2.0)],
]


def spans(html: str) -> list[tuple[str, str, str]]:
    """(style, tooltip, text) of each token."""
    return re.findall(r'<span class="t" style="([^"]*)" title="([^"]*)">([^<]*)</span>', html)


def test_a_token_has_a_bar_for_each_head_that_selects_it_and_the_reason_as_its_tooltip() -> None:
    found = spans(passage_html(Passage(7, ["a", " b", "c"], MARKS)))
    assert [text for *_, text in found] == ["a", " b", "c"]
    assert [[colour for colour in COLOURS[1:3] if colour in style] for style, *_ in found] == [[], [COLOURS[1]], [COLOURS[2]]]
    assert found[2][1] == "head 1: excess -2.00, left out; head 2: excess -2.00, selected"
    assert found[0][1] == "head 1: does not predict it; head 2: does not predict it"


def test_the_background_is_red_above_the_reference_and_blue_below() -> None:
    found = [re.search(r"[:,]#(..)(..)(..);", style) for style, *_ in spans(passage_html(Passage(7, ["a", "b", "c"], MARKS)))]
    colours = [tuple(int(part, 16) for part in match.groups()) for match in found if match]
    white, red, blue = colours
    assert white == (255, 255, 255)
    assert red[0] == 255 > red[2]
    assert blue[2] == 255 > blue[0]


def test_hostile_text_is_escaped_and_the_page_needs_nothing_else() -> None:
    html = passage_html(Passage(7, ['<script>alert("1")</script>', "&lt;", "\n"], MARKS))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "&amp;lt;" in html
    assert not re.search(r"(src|href)=", html)


@pytest.mark.parametrize("texts", [["a", "b", "c"], ["x" * 500, "$x_{", "数\n\0"], ["\n", "\n", ""]])
def test_any_text_can_be_drawn(texts: list[str]) -> None:
    assert passage_png(Passage(7, texts, MARKS)).startswith(b"\x89PNG")


def test_tokens_are_laid_on_lines_that_end_at_line_breaks_and_at_the_margin() -> None:
    assert list(_placed(["ab", "\n", "c"])) == [(0, 0, "ab"), (0, 2, "↵"), (1, 0, "c")]
    places = list(_placed(["abcdefg "] * 30))
    assert max(column + len(text) for _, column, text in places) <= COLUMNS
    assert [line for line, column, _ in places if column == 0] == list(range(places[-1][0] + 1))
