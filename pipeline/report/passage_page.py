"""A passage whose tokens are coloured by what the heads made of them, as a stand-alone HTML page and as a PNG.

A token's background is its mean excess loss over the heads: red above 0, where the policy is worse than the reference, blue
below. The bars under it are the heads, from head 1 on: there is one where the head selects the token.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from pipeline.report.colours import COLOURS

COLUMNS = 92
"""Characters of a line of the picture."""
_FULL_COLOUR_AT = 3.0
"""Excess loss, in nats, from which a background has its full colour."""


class Mark(NamedTuple):
    """Selection and excess loss of a token by one head."""

    selected: bool
    excess: float


class Passage(NamedTuple):
    """A passage after a step. texts: of each token. marks: [heads 1...][tokens]; None where a head does not predict the
    token."""

    step: int
    texts: list[str]
    marks: list[list[Mark | None]]

    def of_token(self, token: int) -> list[Mark | None]:
        return [of_head[token] for of_head in self.marks]


def passage_html(passage: Passage) -> str:
    """Return the page; all text of the passage is escaped."""
    tokens = "".join(_token_html(text, passage.of_token(number)) for number, text in enumerate(passage.texts))
    heads = " ".join(
        f'<span class="head" style="background:{_head_colour(number)}"></span>head {number + 1}'
        for number in range(len(passage.marks))
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Selected tokens</title>\n<style>'
        "body { font: 15px/2.2 ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }"
        "p { font: 14px/1.5 system-ui, sans-serif; } .t { white-space: pre-wrap; padding-bottom: 1px; }"
        ".head { display: inline-block; width: 1.2em; height: 4px; margin: 0 0.3em 0.25em 0.8em; }"
        f"</style></head>\n<body>\n<p>Step {passage.step}. Bars: the heads that select a token. Red: the policy's loss exceeds "
        f"the reference's; blue: it is lower. {heads}</p>\n<div>{tokens}</div>\n</body></html>\n"
    )


def passage_png(passage: Passage) -> bytes:
    """Draw the passage on lines of `COLUMNS` characters."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    placed = list(_placed(passage.texts))
    num_lines = max((line for line, _, _ in placed), default=0) + 1
    with rc_context({"text.parse_math": False, "font.family": "monospace", "font.size": 9}):
        # A line of the heading, then those of the passage, a unit high each.
        figure = Figure(figsize=(COLUMNS * 0.0775 + 0.3, (num_lines + 1.4) * 0.3 + 0.1), dpi=110)
        axes = figure.add_axes((0.02, 0.0, 0.96, 1.0))
        axes.set(xlim=(0, COLUMNS), ylim=(num_lines + 0.2, -1.2))
        axes.set_axis_off()
        axes.text(0, -0.6, f"step {passage.step}   bars: selected by", fontsize=8)
        for head in range(len(passage.marks)):
            axes.text(32 + 10 * head, -0.6, f"head {head + 1}", fontsize=8, color=_head_colour(head), weight="bold")

        for token, (line, column, shown) in enumerate(placed):
            axes.text(column, line + 0.5, shown)
            for left, top, width, height, colour in _boxes(line, column, len(shown), passage.of_token(token)):
                axes.add_patch(Rectangle((left, top), width, height, color=colour, linewidth=0))

        file = io.BytesIO()
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            # A character that the font lacks is drawn as a box.
            figure.savefig(file, format="png")
    return file.getvalue()


def _boxes(
    line: int, column: int, width: int, marks: Sequence[Mark | None]
) -> Iterator[tuple[float, float, float, float, str]]:
    """(left, top, width, height, colour) of a token's background, and of the bars below it."""
    yield column, line, width, 0.62, _background(marks)
    for head, mark in enumerate(marks):
        if mark is not None and mark.selected:
            yield column + 0.05, line + 0.66 + 0.1 * head, width - 0.1, 0.07, _head_colour(head)


def _placed(texts: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(line, column, what is shown) of each token; line breaks are shown as a sign."""
    line = column = 0
    for text in texts:
        shown = "".join(character if character.isprintable() else "↵" if character == "\n" else "·" for character in text)
        shown = shown[:COLUMNS] or "·"
        if column + len(shown) > COLUMNS:
            line, column = line + 1, 0
        yield line, column, shown
        column += len(shown)
        if "\n" in text:
            line, column = line + 1, 0


def _token_html(text: str, marks: Sequence[Mark | None]) -> str:
    """A token with its bars, as gradients below each other, and what each head found as its tooltip."""
    colours = {place: _head_colour(place) for place, mark in enumerate(marks) if mark is not None and mark.selected}
    below = [4 * (len(marks) - 1 - place) for place in colours]
    bars = [
        f"linear-gradient({colour},{colour}) 0 calc(100% - {pixels}px)/100% 3px no-repeat"
        for colour, pixels in zip(colours.values(), below, strict=True)
    ]
    found = "; ".join(_words(head, mark) for head, mark in enumerate(marks, 1)) or "no head"
    shown = escape(text.replace("\n", "↵\n") or "·")
    style = ",".join([*bars, _background(marks)])
    bottom = 4 * len(marks)
    return f'<span class="t" style="background:{style};padding-bottom:{bottom}px" title="{escape(found)}">{shown}</span>'


def _words(head: int, mark: Mark | None) -> str:
    if mark is None:
        return f"head {head}: does not predict it"
    return f"head {head}: excess {mark.excess:.2f}, {'selected' if mark.selected else 'left out'}"


def _background(marks: Sequence[Mark | None]) -> str:
    """The colour of a mean excess loss, from blue over white to red."""
    known = [mark.excess for mark in marks if mark is not None and math.isfinite(mark.excess)]
    mean = sum(known) / len(known) if known else 0.0
    strength = min(1.0, abs(mean) / _FULL_COLOUR_AT)
    others = round(255 - 110 * strength)
    red, blue = (255, others) if mean > 0 else (others, 255)
    return f"#{red:02x}{others:02x}{blue:02x}"


def _head_colour(index: int) -> str:
    """The colour of a selecting head; that of head 0 is left out."""
    return COLOURS[(index + 1) % len(COLOURS)]
