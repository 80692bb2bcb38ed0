"""The charts of a page about one or several runs, as panels.

Of one run a panel shows all heads; of several there is a panel for each head, with the runs in their colours.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pipeline.report.charts import Panel
from pipeline.report.curves import Curve, Enrichment, Metric, curve_of
from pipeline.report.run_files import Record, RunFiles


class Chart(NamedTuple):
    """A chart of the page: heading, one sentence about it, panels. columns: panels in a row, where that has a meaning."""

    heading: str
    text: str
    panels: list[Panel]
    columns: int | None = None


def charts_of(runs: Sequence[RunFiles]) -> Iterator[Chart]:
    """Yield all charts, losses and selection first."""
    alone = len(runs) == 1
    # A row of panels for each run, where all have as many.
    numbers = {run.num_heads - 1 for run in runs}
    columns = max(numbers) if not alone and len(numbers) == 1 and max(numbers) > 1 else None

    yield Chart("Policy loss by head", "Mean over all valid pairs, selected or not; nats a token.", _by_head(runs, "loss"))
    yield Chart("Held-out loss by head", "Of each held-out set; nats a token.", list(_held_out(runs)))
    yield Chart(
        "Excess loss",
        f"Policy minus reference loss over valid pairs: mean{', and the band of the middle 80 %' if alone else ''}; nats.",
        _by_head(runs, "excess_mean", band=("excess_p10", "excess_p90")),
    )
    yield Chart("Thresholds", "The smallest excess loss that is still selected; nats.", _by_head(runs, "threshold"))
    yield Chart(
        "Selected and rejected pairs", "Policy loss of either; nats a token.", list(_selected_and_rejected(runs)), columns
    )
    yield Chart(
        "Enrichment of the sources",
        "A source's share of the selected pairs over its share of the data: above 1 it is preferred.",
        list(_enrichment(runs)),
        columns,
    )
    yield Chart(
        "Selection",
        "Share of valid pairs that is selected; and of pairs that two heads select, of those that either selects.",
        [
            *(panel._replace(is_share=True) for panel in _by_head(runs, "selected_ratio")),
            _overall(runs, "agreement", "agreement of heads"),
        ],
    )
    yield Chart("Optimization", "", [_overall(runs, *each) for each in (("learning_rate",), ("grad_norm", "gradient norm"))])
    yield Chart("Speed and memory", "Dotted lines: training went on from a checkpoint." if alone else "", list(_speed(runs)))


def _by_head(runs: Sequence[RunFiles], quantity: str, band: tuple[str, str] | None = None) -> list[Panel]:
    """Panels of a quantity of each head."""
    num_heads = max(run.num_heads for run in runs)
    if len(runs) == 1:
        keys = [f"head {head}" for head in range(num_heads)]
        curves = [_of_head(runs[0], runs[0].training, quantity, head, key) for head, key in enumerate(keys)]
        return [Panel(quantity.replace("_", " "), curves, bands=_bands(runs[0], keys, band), marks=_marks(runs))]
    return [
        Panel(f"head {head}", [_of_head(run, run.training, quantity, head, run.name) for run in runs])
        for head in range(num_heads)
    ]


def _of_head(run: RunFiles, records: Sequence[Record], quantity: str, head: int, key: str) -> Curve:
    return curve_of(run, records, Metric(f"{quantity}_head_{head}"), key, key)


def _bands(run: RunFiles, keys: Sequence[str], band: tuple[str, str] | None) -> dict[str, tuple[Curve, Curve]]:
    if band is None:
        return {}
    lower, upper = band
    return {
        key: (_of_head(run, run.training, lower, head, key), _of_head(run, run.training, upper, head, key))
        for head, key in enumerate(keys)
    }


def _held_out(runs: Sequence[RunFiles]) -> Iterator[Panel]:
    for name in dict.fromkeys(name for run in runs for name in run.sets):
        records = [[record for record in run.validation if str(record.get("set", "")) == name] for run in runs]
        of_set = f"{name}: " if name else ""
        if len(runs) == 1:
            curves = [_of_head(runs[0], records[0], "loss", head, f"head {head}") for head in range(runs[0].num_heads)]
            yield Panel(f"{of_set}loss", curves)
            continue
        for head in range(max(run.num_heads for run in runs)):
            pairs = zip(runs, records, strict=True)
            yield Panel(f"{of_set}head {head}", [_of_head(run, of_run, "loss", head, run.name) for run, of_run in pairs])


def _selected_and_rejected(runs: Sequence[RunFiles]) -> Iterator[Panel]:
    for run in runs:
        of_run = f"{run.name}: " if len(runs) > 1 else ""
        for head in range(1, run.num_heads):
            curves = [
                curve_of(run, run.training, Metric(f"{kind}_loss_head_{head}"), kind, kind) for kind in ("selected", "rejected")
            ]
            yield Panel(f"{of_run}head {head}", curves)


def _enrichment(runs: Sequence[RunFiles]) -> Iterator[Panel]:
    for run in runs:
        of_run = f"{run.name}: " if len(runs) > 1 else ""
        for head in range(1, run.num_heads):
            curves = [curve_of(run, run.training, Enrichment(head, name), name, f"source {name}") for name in run.sources]
            yield Panel(f"{of_run}head {head}", curves, line_at=1.0)


def _overall(runs: Sequence[RunFiles], name: str, title: str = "", scale: float = 1.0, unit: str = "") -> Panel:
    """A panel of a metric that a run has one of."""
    reads: Callable[[Record], object] = Metric(name)
    curves = [curve_of(run, run.training, reads, run.name, run.name) for run in runs]
    scaled = [curve._replace(y=[value * scale for value in curve.y]) for curve in curves]
    return Panel(title or name.replace("_", " "), scaled, unit)


def _speed(runs: Sequence[RunFiles]) -> Iterator[Panel]:
    of_speed = [
        _overall(runs, "tokens_per_second", "tokens per second"),
        _overall(runs, "seconds_per_step", "seconds a step"),
        _overall(runs, "mfu", "useful FLOPs of the device's peak", 100, "%"),
        _overall(runs, "memory_bytes", "memory of the fullest rank", 1e-9, "GB"),
        _overall(runs, "data_wait", "waiting for data", 100, "%"),
    ]
    yield from (panel._replace(marks=_marks(runs)) for panel in of_speed)


def _marks(runs: Sequence[RunFiles]) -> list[float]:
    """Steps at which an only run went on after a restart or a rollback."""
    if len(runs) > 1:
        return []
    return [float(event.step) for event in runs[0].history.events if event.kind == "resume" and event.step]
