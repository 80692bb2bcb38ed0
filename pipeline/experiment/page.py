"""The results of an experiment as one HTML page that needs nothing else."""

import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.report.charts import Panel, panels_figure
from pipeline.report.colours import looks_of
from pipeline.report.curves import Curve
from pipeline.report.page import document, number, picture, text

_BUDGETS = {
    "tokens": "tokens",
    "pairs": "supervised pairs",
    "flops": "FLOPs",
    "flops_with_reference": "FLOPs, reference included",
    "seconds": "time",
}


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    return document("Does selection help multi-token prediction?", list(_parts(results)))


def _parts(results: dict[str, Any]) -> Iterator[str]:
    if not results["decides"]:
        yield '<p class="note">This plan is too small to decide anything; it shows that the machinery runs.</p>'
    if not results["valid"]:
        yield f'<p class="note">Invalid. {text("; ".join(results["invalid_because"]))}.</p>'
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
    yield (
        f"<p>Frequencies alone cost {results['unigram']:.3f} nats. A rate with * lies at the edge of those tried. With † the "
        "last head learned less beyond frequencies than the plan asks of main arms.</p>"
    )
    yield "<h2>Bits per byte over tokens</h2>" + _curves(results["arms"])
    yield from _decoding(results)
    yield from _selected(results)


def _decoding(results: dict[str, Any]) -> Iterator[str]:
    """Tables of the tokens that a step of decoding by drafts accepts, of speed, and of gradients."""
    yield "<h2>Tokens accepted per step of decoding by drafts, verified; and speed</h2>" + _table(
        ["arm", "accepted per step", "tokens/s alone on a core", "gradient norm of each head at the trunk"],
        [
            [
                name,
                number(arm["accepted_per_step"]),
                number(arm["tokens_per_second"]),
                " ".join(number(norm, 3) for norm in arm["trunk_gradient_norms"]),
            ]
            for name, arm in results["arms"].items()
        ],
    )
    yield _table(
        ["first − second", "difference of accepted", "95 % interval", "paired t"],
        [
            [
                f"{each['first']} − {each['second']}",
                f"{each['mean']:+.4f}",
                f"{each['low']:+.4f} to {each['high']:+.4f}",
                f"p = {each['p_t']:.4f}",
            ]
            for each in results["comparisons_of_accepted"]
        ],
    )


def _selected(results: dict[str, Any]) -> Iterator[str]:
    """Tables of selected shares: by source, over time, by the truth of each token, and of two selections' overlap."""
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
    yield "<h2>Enrichment over tokens: a source's share of the selected pairs over its share of all</h2>" + _enrichment(results)
    selections = results["selections"]
    truth = selections.get("selected_by_truth", {})
    kinds = list(dict.fromkeys(kind for shares in truth.values() for kind in shares))
    if truth:
        yield "<h2>Share of each kind of token that the model selects at its end, by the truth of each token</h2>" + _table(
            ["arm", *kinds],
            [[arm, *(f"{shares[kind]:.1%}" if kind in shares else "" for kind in kinds)] for arm, shares in truth.items()],
        )
    overlaps = {"the shifted and the matched reference": "shifted_and_matched", "two seeds": "two_seeds"}
    rows = [[name, *(f"{share:.3f}" for share in selections[key])] for name, key in overlaps.items() if key in selections]
    if rows:
        heads = [f"head {head}" for head in range(1, len(rows[0]))]
        yield "<h2>Overlap of two selections: pairs that both take, of those that either takes</h2>" + _table(
            ["", *heads], rows
        )
        yield f"<p>Two selections that have nothing to do with each other overlap in {selections['chance']:.3f}.</p>"
    if "differ_on" in selections:
        sets = list(next(iter(selections["differ_on"].values())))
        yield "<h2>Tokens on which the shifted and the matched reference differ</h2>" + _table(
            ["the target", *sets],
            [[name, *(f"{shares[of]:.1%}" for of in sets)] for name, shares in selections["differ_on"].items()],
        )


def _enrichment(results: dict[str, Any]) -> str:
    """A panel for each arm that selects, a line for each source."""
    arms = {name: arm["enrichment"] for name, arm in results["arms"].items() if _selects(arm["enrichment"])}
    sources = list(dict.fromkeys(key for points in arms.values() for point in points for key in point if key != "tokens"))
    panels = [
        Panel(
            name,
            [
                Curve(source, source, [point["tokens"] for point in points], [point.get(source, math.nan) for point in points])
                for source in sources
            ],
            line_at=1.0,
            along="tokens",
        )
        for name, points in arms.items()
    ]
    drawn = panels_figure(panels, looks_of(sources))
    return "" if drawn is None else picture(drawn, "enrichment of each source over tokens, by arm")


def _selects(points: Sequence[dict[str, float]]) -> bool:
    return any(abs(value - 1) > 1e-9 for point in points for key, value in point.items() if key != "tokens")


def _arm_row(name: str, arm: dict[str, Any]) -> list[object]:
    spread = arm["standard_deviation"]
    return [
        name,
        f"{arm['bits_per_byte']:.4f}",
        "" if spread is None else f"{spread:.4f}",
        arm["num_seeds"],
        f"{arm['learning_rate']:g}{'*' if arm['rate_at_edge'] else ''}",
        *(f"{arm['at_equal'][budget]:.4f}" for budget in _BUDGETS),
        " ".join(f"{loss:.3f}" for loss in arm["losses"]) + ("" if arm["last_head_learned"] else "†"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return '<div class="wide"><table>' + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table></div>"


def _curves(arms: dict[str, Any]) -> str:
    """The mean over each arm's seeds at its best rate; the first validation, of untrained models, is left out."""
    curves = []
    for name, arm in arms.items():
        points = [
            (of_seeds[0]["tokens"], statistics.fmean(point["bits_per_byte"] for point in of_seeds))
            for of_seeds in zip(*(run["curve"] for run in arm["runs"]), strict=True)
            if of_seeds[0]["tokens"]
        ]
        curves.append(Curve(name, name, [tokens for tokens, _ in points], [bits for _, bits in points]))
    halves = [curves[: (len(curves) + 1) // 2], curves[(len(curves) + 1) // 2 :]]
    drawn = panels_figure([Panel("", half, unit="bits per byte", along="tokens") for half in halves], looks_of(list(arms)))
    return "" if drawn is None else picture(drawn, "bits per byte over tokens, by arm")


def machine() -> str:
    """Describe what the experiment ran on, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{platform.machine()} cores, torch {torch.__version__}"
