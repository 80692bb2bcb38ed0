"""Figures by matplotlib, as SVG or PNG bytes. Labels are text as it is: neither formulas nor markup."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.colours import Look, looks_of
from pipeline.report.curves import Curve, has_values

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    # The same runs give the same bytes.
    "svg.hashsalt": "pipeline",
    # A dollar in a label begins no formula.
    "text.parse_math": False,
}


class Panel(NamedTuple):
    """One set of axes. bands: a curve's lower and upper edge, by its key. marks: steps at which a job started again. line_at:
    where a thin line is drawn across. is_share: true for what lies between 0 and 1. along: the unit of the horizontal
    axis."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    bands: Mapping[str, tuple[Curve, Curve]] = {}
    marks: Sequence[float] = ()
    line_at: float | None = None
    is_share: bool = False
    along: str = "step"


def panels_figure(
    panels: Sequence[Panel], looks: Mapping[str, Look], file_format: str = "svg", columns: int | None = None
) -> bytes | None:
    """Draw panels side by side, at most four in a row; None where nothing has a value.

    columns: panels in a row, all of which then have one scale, so that they can be compared.
    """
    shown = [panel for panel in panels if any(map(has_values, panel.curves))]
    if not shown:
        return None
    in_a_row = columns or min(4 if len(shown) > 2 else 2, len(shown))
    rows = -(-len(shown) // in_a_row)
    with rc_context(_STYLE):
        width = 3.1 if in_a_row > 2 else 5.2
        figure = Figure(figsize=(width * in_a_row, 2.7 * rows), layout="constrained")
        first: Axes | None = None
        for number, panel in enumerate(shown):
            axes = figure.add_subplot(rows, in_a_row, number + 1, sharey=first)
            first = axes if columns else None
            _draw(axes, panel, looks)
        return _bytes_of(figure, file_format)


def bars_figure(shares: Mapping[str, Mapping[str, float]]) -> bytes | None:
    """Draw a stacked bar of percentages for each run: {run: {kind: percent}}."""
    if not any(sum(parts.values()) for parts in shares.values()):
        return None
    kinds = list(next(iter(shares.values())))
    looks = looks_of(kinds)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 0.9 + 0.4 * len(shares)), layout="constrained")
        axes = figure.add_subplot()
        left = [0.0] * len(shares)
        for kind in kinds:
            widths = [parts[kind] for parts in shares.values()]
            axes.barh(list(range(len(shares))), widths, left=left, color=looks[kind].colour, label=kind.replace("_", " "))
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_yticks(list(range(len(shares))), [_plain(name) for name in shares])
        axes.invert_yaxis()
        axes.set_xlabel("% of the wall clock")
        axes.legend(ncols=len(kinds), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
        return _bytes_of(figure, "svg")


def _draw(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    for step in panel.marks:
        axes.axvline(step, color="#999999", linewidth=0.8, linestyle=":")
    if panel.line_at is not None:
        axes.axhline(panel.line_at, color="#999999", linewidth=0.8)
    for curve in filter(has_values, panel.curves):
        colour, dashes = looks[curve.key]
        style: Any = {"color": colour, "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.2, "markersize": 3}
        marker = "o" if len(curve.x) < 12 else ""
        axes.plot(curve.x, curve.y, marker=marker, label=_plain(curve.label), **style)
        if curve.key in panel.bands:
            lower, upper = panel.bands[curve.key]
            axes.fill_between(lower.x, lower.y, upper.y, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(_plain(panel.title), fontsize=9)
    if panel.is_share:
        axes.set_ylim(0, 1.05)
    axes.set_xlabel(panel.along)
    if panel.along == "step":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel(panel.unit)
    if len(panel.curves) > 1:
        # Long enough for a pattern of dashes.
        axes.legend(fontsize=7, handlelength=3.5)


def _plain(text: str) -> str:
    """A label that matplotlib shows also if it begins with an underscore."""
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def _bytes_of(figure: Figure, file_format: str) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format=file_format, dpi=110, metadata={"Date": None} if file_format == "svg" else {})
    return file.getvalue()
