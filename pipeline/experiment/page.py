"""The results of an experiment as one HTML page that needs nothing else."""

import platform
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.report.colours import COLOURS
from pipeline.report.page import document, text

_BUDGETS = {
    "tokens": "tokens",
    "pairs": "supervised pairs",
    "flops": "FLOPs",
    "flops_with_reference": "FLOPs, reference included",
}
_WIDTH, _HEIGHT = 760, 320


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    return document("Does selection help multi-token prediction?", list(_parts(results)))


def _parts(results: dict[str, Any]) -> Iterator[str]:
    if not results["decides"]:
        yield '<p class="note">This plan is too small to decide anything; it shows that the machinery runs.</p>'
    for reason in results["invalid_because"]:
        yield f'<p class="note">Invalid: {text(reason)}.</p>'
    yield f"<p>{text(results['metric'])}. {text(results['hours'])} hours on {text(results['machine'])}.</p>"

    yield "<h2>Comparisons</h2>" + _table(
        ["first − second", "", "difference", "95 % interval", "paired t", "Holm", "signs", "seeds"],
        [
            [
                f"{each['first']} − {each['second']}",
                "primary" if each["primary"] else "exploratory",
                f"{each['mean']:+.4f}",
                f"{each['low']:+.4f} to {each['high']:+.4f}",
                f"p = {each['p_t']:.4f}",
                f"p = {each['p_holm']:.4f}" if "p_holm" in each else "",
                f"p = {each['p_sign']:.4f}",
                len(each["differences"]),
            ]
            for each in results["comparisons"]
        ],
    )
    yield "<h2>Arms</h2>" + _table(
        [
            "arm",
            "bits per byte",
            "± sd",
            "seeds",
            "rate",
            *(f"at equal {name}" for name in _BUDGETS.values()),
            "losses of the heads",
        ],
        [_arm_row(name, arm) for name, arm in results["arms"].items()],
    )
    yield f"<p>Frequencies alone cost {results['unigram']:.3f} nats. A rate with * lies at the edge of those tried.</p>"
    yield "<h2>Bits per byte over tokens, each seed a line</h2>" + _chart(results["arms"])
    sources = list(dict.fromkeys(name for arm in results["arms"].values() for name in arm["selected_by_source"]))
    yield "<h2>Share of each source's pairs that heads 1… selected, in the last quarter</h2>" + _table(
        ["arm", *sources],
        [
            [
                name,
                *(
                    f"{arm['selected_by_source'][source]:.1%}" if source in arm["selected_by_source"] else ""
                    for source in sources
                ),
            ]
            for name, arm in results["arms"].items()
        ],
    )


def _arm_row(name: str, arm: dict[str, Any]) -> list[object]:
    spread = arm["standard_deviation"]
    return [
        name,
        f"{arm['bits_per_byte']:.4f}",
        "" if spread is None else f"{spread:.4f}",
        arm["num_seeds"],
        f"{arm['learning_rate']:g}{'*' if arm['rate_at_edge'] else ''}",
        *(f"{arm['at_equal'][budget]:.4f}" for budget in _BUDGETS),
        " ".join(f"{loss:.3f}" for loss in arm["losses"]),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return '<div class="wide"><table>' + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table></div>"


def _chart(arms: dict[str, Any]) -> str:
    """Curves of all runs as SVG; the first validation, of untrained models, is left out."""
    lines = [
        (number, [(point["tokens"], point["bits_per_byte"]) for point in run["curve"] if point["tokens"]])
        for number, arm in enumerate(arms.values())
        for run in arm["runs"]
    ]
    points = [point for _, of_line in lines for point in of_line]
    most, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    drawn = []
    for number, of_line in lines:
        places = " ".join(
            f"{40 + x / most * (_WIDTH - 60):.1f},{_HEIGHT - 20 - (y - low) / span * (_HEIGHT - 40):.1f}" for x, y in of_line
        )
        drawn.append(f'<polyline points="{places}" fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.2"/>')
    legend = " ".join(
        f'<span class="swatch" style="background:{COLOURS[number % len(COLOURS)]}"></span>{text(name)}'
        for number, name in enumerate(arms)
    )
    axis = f'<text x="0" y="14" font-size="11">{high:.3f}</text><text x="0" y="{_HEIGHT - 20}" font-size="11">{low:.3f}</text>'
    end = f'<text x="{_WIDTH - 90}" y="{_HEIGHT - 4}" font-size="11">{most:,} tokens</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">{axis}{end}{"".join(drawn)}</svg><p>{legend}</p>'


def machine() -> str:
    """Describe what the experiment ran on, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{platform.machine()} cores, torch {torch.__version__}"
