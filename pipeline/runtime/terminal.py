"""Print what a run shows: progress lines, blocks of selection statistics, the table that closes it.

On a terminal progress is one line that is written over, in colour; in a file, or through a pipe, it is a plain line each time.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from pipeline.runtime.metrics import Record, ratio
from pipeline.runtime.table import aligned

_BETWEEN = "  "
_DISPENSABLE = ("threshold ", "heads ", "lr ", "grad ")
"""Parts that a live line goes without on a terminal that is too narrow for it, in this order; the records have them."""


class Terminal:
    """Standard output: lines that stay, and one live line below them where it is a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.has_live_line = False

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self.clear()
        print(text, flush=True)

    def progress(self, line: str) -> None:
        """Show how far the run is."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return self.say(line)
        self.clear()
        # A cut would take the end of a line, where the time left stands.
        for name in _DISPENSABLE:
            if len(line) >= self.console.width:
                line = _BETWEEN.join(part for part in line.split(_BETWEEN) if not part.startswith(name))

        # The cursor stays visible at the line's beginning, so that a killed process leaves the terminal as it was.
        shown = Text(line, no_wrap=True, overflow="ellipsis")
        shown.truncate(max(1, self.console.width - 1), overflow="ellipsis")
        shown.highlight_regex(r"^step +\d+/\d+", "bold")
        shown.highlight_regex(r"loss \S+", "bold cyan")
        shown.highlight_regex(r"none", "bold red")
        shown.highlight_regex(r"ETA \S+", "green")
        self.console.print(shown, end="\r")
        self.has_live_line = True

    def clear(self) -> None:
        """Take the live line away."""
        if self.has_live_line:
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self.has_live_line = False


def progress_line(record: Record, total_steps: int, seconds_left: float) -> str:
    """Format one line: step/total, objective, loss and threshold of each head, learning rate, gradient norm, speed, memory,
    waits, time left."""
    heads = _heads(record)
    losses = " ".join(_number(record[f"loss_head_{head}"], 3) for head in heads)
    thresholds = " ".join(_number(record[f"threshold_head_{head}"], 2) for head in heads[1:])
    parts = [
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {_number(record['loss'], 4)}",
        f"heads {losses}",
        f"threshold {thresholds}" if heads[1:] else "",
        f"lr {record['learning_rate']:.2e}",
        f"grad {_number(record['grad_norm'], 2)}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"MFU {_percent(record['mfu'])}" if "mfu" in record else "",
        f"{record['memory_bytes'] / 1e9:.2f} GB" if "memory_bytes" in record else "",
        f"wait {_percent(record['data_wait'])}" if "data_wait" in record else "",
        f"ETA {_duration(seconds_left)}",
    ]
    return _BETWEEN.join(filter(None, parts))


def selection_block(record: Record) -> str:
    """Format the statistics of one step's selection as a line and a small table, a row for each head."""
    rows = [["", "pairs selected", "of valid", "threshold", "mean excess"]]
    for head in _heads(record):
        # Head 0 selects all, by no threshold.
        of_selection = [_number(record[f"{key}_head_{head}"], 2) if head else "–" for key in ("threshold", "excess_mean")]
        counts = [f"{record[f'selected_count_head_{head}']:,}", _percent(record[f"selected_ratio_head_{head}"])]
        rows.append([_name_of(head), *counts, *of_selection])

    ratio_of_all, heads = _percent(record["selection_ratio"]), _number(record["heads_per_position"], 2)
    headline = f"step {record['step']}: {ratio_of_all} of all pairs selected, {heads} heads a position"
    return "\n".join([headline, *(f"  {line}" for line in aligned(rows).splitlines())])


def held_out_text(record: Record) -> str:
    """Format a validation for a line: loss per head, and what else head 0's loss means."""
    losses = " ".join(_number(record[f"loss_head_{head}"], 3) for head in _heads(record))
    bits = f", {_number(record['bits_per_byte'], 3)} bits per byte" if "bits_per_byte" in record else ""
    return f"per head {losses}; perplexity {_number(record['perplexity_head_0'], 2)}{bits}"


def summary_table(records: Sequence[Record], run_dir: Path, source_names: Sequence[str]) -> str:
    """Format the table that closes a run.

    Rows: held-out loss per head at the start and the end, for each set; the share selected per head over the last quarter of
    the steps; and for each named source its share in the data and among the selected pairs. What is selected is known of the
    logged steps; tokens are counted over all.
    """
    trained = [record for record in records if "split" not in record]
    if not trained:
        return ""
    heads, last = _heads(trained[-1]), trained[-1]["step"]
    last_quarter = [record for record in trained if record["step"] > 0.75 * last]
    before = next((record for record in reversed(trained) if record["step"] <= 0.75 * last), {"step": 0})

    # Selected over the last quarter: sum counts over its logged steps, then divide once.
    counts = {key: sum(record.get(key) or 0 for record in last_quarter) for key in trained[-1] if "_count_" in key}
    selected = [_percent(ratio(counts[f"selected_count_head_{h}"], counts[f"valid_count_head_{h}"])) for h in heads]
    rows = [["", *map(_name_of, heads)], *_held_out_rows(records, heads), ["selected", *selected]]
    note = f"selection: of {_logged(last_quarter)}"
    if len(source_names) > 1:
        tokens = {name: _tokens(trained[-1], name) - _tokens(before, name) for name in source_names}
        rows += _source_rows(tokens, counts, heads)
        note = f"data: all tokens of steps {before['step'] + 1} to {last}; {note}"

    where = [
        f"run directory:  {run_dir}",
        f"look at it:     tensorboard --logdir {run_dir.parent}   (each head is a run of its own)",
        f"as one page:    python launch/report.py {run_dir} -o page.html",
    ]
    return "\n".join([aligned(rows), f"({note})", "", *where])


def _held_out_rows(records: Sequence[Record], heads: Sequence[int]) -> Iterator[list[str]]:
    """Losses of the first validation of each set and of the last."""
    held_out: dict[str | None, list[Record]] = {}
    for record in records:
        if record.get("split") == "validation":
            held_out.setdefault(record.get("set"), []).append(record)
    for name, of_set in held_out.items():
        for when, record in (("start", of_set[0]), ("end", of_set[-1])):
            losses = [_number(record[f"loss_head_{head}"], 3) for head in heads]
            yield [f"held-out loss{f' of {name}' if name else ''}, {when} (step {record['step']})", *losses]


def _source_rows(tokens: Mapping[str, int], counts: Mapping[str, int], heads: Sequence[int]) -> Iterator[list[str]]:
    """Shares of each source in the data, by its tokens, and among the selected pairs."""
    for name in tokens:
        of_data = _percent(ratio(tokens[name], sum(tokens.values())))
        parts = [(counts[f"selected_count_head_{h}_source_{name}"], counts[f"selected_count_head_{h}"]) for h in heads]
        yield [f"share of {name} in the data", *([of_data] * len(heads))]
        yield [f"share of {name} among selected", *(_percent(ratio(part, whole)) for part, whole in parts)]


def _tokens(record: Record, source: str) -> int:
    """Tokens of a source that the run has consumed up to a record; 0 of one that does not tell."""
    return int(record.get(f"data_tokens_source_{source}") or 0)


def _logged(records: Sequence[Record]) -> str:
    first, last = records[0]["step"], records[-1]["step"]
    return f"the {len(records)} logged steps from {first} to {last}" if len(records) > 1 else f"the logged step {last} alone"


def _heads(record: Record) -> list[int]:
    return [head for head in range(len(record)) if f"loss_head_{head}" in record]


def _name_of(head: int) -> str:
    return f"head {head} (t+{head + 1})"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
