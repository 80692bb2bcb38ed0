"""The page about one or several runs: one HTML file that needs nothing else, no script and no network.

All text that comes of a run is escaped, and secrets in it are masked.
"""

import base64
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from pipeline.report.charts import bars_figure, panels_figure
from pipeline.report.colours import Look, looks_of
from pipeline.report.figures import charts_of
from pipeline.report.run_files import RunFiles
from pipeline.storage.masking import masked_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0.3rem; border-top: 1px solid #ddd; padding-top: 1rem; }
p { margin: 0.3rem 0; color: #555; } img { max-width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0; } td, th { padding: 0.2rem 0.7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
 tr { border-bottom: 1px solid #eee; } th { color: #555; font-weight: 600; }
.note { color: #a33; } .swatch { margin-right: 0.4em; vertical-align: middle; }
.charts { display: flex; flex-wrap: wrap; column-gap: 2rem; } .charts p { contain: inline-size; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(runs: Sequence[RunFiles]) -> str:
    """Return the page about these runs."""
    names = ", ".join(run.name for run in runs)
    looks = _looks(runs)
    parts = [
        *_summary(runs, looks),
        *_notes(runs),
        *_figures(runs, looks),
        *_wall_clock(runs),
        *_restarts(runs),
        *_settings(runs),
    ]
    return document(names, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole HTML document; the parts are HTML, the title is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def text(value: object) -> str:
    """Escape a text for HTML, its secrets masked."""
    return escape(masked_text(str(value)))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of HTML cells; the first row is the heading."""
    head, *body = ["".join(f"<{kind}>{cell}</{kind}>" for cell in row) for kind, row in _kinds(rows)]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table></div>'


def number(value: Any, digits: int = 4) -> str:
    """Format a number with so many significant digits, or all of its whole part; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    is_whole = isinstance(value, int) or abs(value) >= 10**digits
    return f"{round(value):,}" if is_whole else f"{value:#,.{digits}g}".rstrip(".")


def picture(svg: bytes, about: str) -> str:
    """Return an image that is in the page itself."""
    return f'<img alt="{text(about)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _kinds(rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    for place, row in enumerate(rows):
        yield ("td" if place else "th"), row


def _looks(runs: Sequence[RunFiles]) -> dict[str, Look]:
    """One look for each run, head and source, the same in all charts."""
    looks = looks_of([f"head {head}" for head in range(max(run.num_heads for run in runs))])
    looks |= {"selected": Look("#d95f02"), "rejected": Look("#7f7f7f")}
    looks |= looks_of([f"source {name}" for run in runs for name in run.sources])
    return looks | looks_of([run.name for run in runs])


def _summary(runs: Sequence[RunFiles], looks: dict[str, Look]) -> Iterator[str]:
    num_heads = max(run.num_heads for run in runs)
    heads = [f"held-out loss, head {head}" for head in range(num_heads)]
    rows = [["run", "state", "tokens", *heads, "bits per byte", "tokens/s", "peak memory", "starts", "productive"]]
    for run in runs:
        last = run.validation[-1] if run.validation else {}
        speeds = [record["tokens_per_second"] for record in run.training if record.get("tokens_per_second")]
        memory = max((record.get("memory_bytes") or 0 for record in run.training), default=0)
        swatch = _swatch(looks[run.name]) if len(runs) > 1 else ""
        rows.append(
            [
                f"{swatch}{text(run.name)}",
                text(run.state),
                number(run.training[-1].get("tokens") if run.training else None),
                *(number(last.get(f"loss_head_{head}")) for head in range(num_heads)),
                number(last.get("bits_per_byte")),
                number(statistics.median(speeds) if speeds else None),
                f"{memory / 1e9:.2f} GB" if memory else "–",
                str(len(run.history.starts)),
                f"{run.clock.percent['productive']:.1f} %" if run.clock.total else "–",
            ]
        )
    yield table(rows)


def _swatch(look: Look) -> str:
    """A stretch of a run's line, as the charts draw it."""
    dashes = f' stroke-dasharray="{" ".join(f"{2 * length:g}" for length in look.dashes)}"' if look.dashes else ""
    line = f'<path d="M0 4H36" stroke="{look.colour}" stroke-width="2"{dashes}/>'
    return f'<svg class="swatch" width="36" height="8">{line}</svg>'


def _notes(runs: Sequence[RunFiles]) -> Iterator[str]:
    notes = [f"{text(run.name)}: {text(note)}" for run in runs for note in run.notes]
    if notes:
        yield "<ul>" + "".join(f'<li class="note">{note}</li>' for note in notes) + "</ul>"


def _figures(runs: Sequence[RunFiles], looks: dict[str, Look]) -> Iterator[str]:
    yield '<div class="charts">'
    for chart in charts_of(runs):
        svg = panels_figure(chart.panels, looks, columns=chart.columns)
        if svg is not None:
            shown = picture(svg, chart.heading)
            yield f"<section><h2>{text(chart.heading)}</h2>\n<p>{text(chart.text)}</p>\n{shown}</section>"
    yield "</div>"


def _wall_clock(runs: Sequence[RunFiles]) -> Iterator[str]:
    svg = bars_figure({run.name: run.clock.percent for run in runs})
    if svg is not None:
        sentence = (
            "Productive: applied steps that the weights descend from, without their waits for data. Reference: those of a "
            "reference that the run has trained. Restarts: from a start, the first one too, to its first step, and the time "
            "between jobs."
        )
        yield f"<h2>Where the time went</h2>\n<p>{sentence}</p>\n{picture(svg, 'shares of the wall clock')}"
        kinds = list(runs[0].clock.seconds)
        rows = [["run", "seconds", *(text(kind.replace("_", " ")) for kind in kinds)]]
        rows += [
            [text(run.name), f"{run.clock.total:,.0f}", *(f"{run.clock.percent[kind]:.2f} %" for kind in kinds)] for run in runs
        ]
        yield table(rows)


def _restarts(runs: Sequence[RunFiles]) -> Iterator[str]:
    """Jobs of each run and rollbacks within them, where there was more than one beginning."""
    of_runs = [rows for rows in map(_beginnings, runs) if len(rows) > 1]
    if of_runs:
        heading = ["run", "began", "host", "ranks", "went on from step"]
        yield f"<h2>Restarts and rollbacks</h2>\n{table([heading, *(row for rows in of_runs for row in rows)])}"


def _beginnings(run: RunFiles) -> list[list[str]]:
    """A row for each job of a run, and one for each time that it went back to a checkpoint after a loss spike."""
    rows: list[list[str]] = []
    waits = False
    for event in run.history.events:
        if event.kind == "start":
            ranks, host = event.values["ranks"], text(event.values.get("host", ""))
            rows.append([text(run.name), _moment(event.values["began"]), host, str(ranks), "–"])
            waits = True
        elif event.kind == "resume" and waits:
            rows[-1][-1] = str(event.step)
            waits = False
        elif event.kind == "resume":
            rows.append([text(run.name), _moment(event.time), "", "", f"{event.step}, after a loss spike"])
    return rows


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _settings(runs: Sequence[RunFiles]) -> Iterator[str]:
    """Settings that differ; then all of them, folded."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = {name: [json.dumps(run.settings[name]) if name in run.settings else "–" for run in runs] for name in names}
    differ = [name for name in names if len(set(values[name])) > 1]
    heading = ["setting", *(text(run.name) for run in runs)]
    if len(runs) > 1:
        rows = [[text(name), *map(text, values[name])] for name in differ]
        yield f"<h2>Settings that differ</h2>\n{table([heading, *rows]) if rows else '<p>None.</p>'}"
    rows = [[text(name), *map(text, values[name])] for name in names]
    yield f"<h2>All settings</h2>\n<details><summary>{len(rows)} settings</summary>{table([heading, *rows])}</details>"
    commands = [f"{run.name}: {json.dumps(run.environment.get('command'))}" for run in runs if run.environment]
    yield f"<pre>{text(chr(10).join(commands))}</pre>"
