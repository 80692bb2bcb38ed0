"""Format metrics for the terminal: progress lines, blocks of selection statistics, the table that closes a run."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.metrics import Record, ratio
from pipeline.runtime.table import aligned


def progress_line(record: Record, total_steps: int, seconds_left: float) -> str:
    """Format one line: step/total, objective, selected share of each head, tokens/s, time left."""
    heads = _heads(record)
    shares = " ".join(_percent(record[f"selected_ratio_head_{head}"]) for head in heads)
    return (
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}  loss {_number(record['loss'], 4)}  "
        f"selected {shares}  {record['tokens_per_second']:,.0f} tokens/s  ETA {_duration(seconds_left)}"
    )


def selection_block(record: Record) -> str:
    """Format the statistics of one step's selection as a block of lines."""
    heads = _heads(record)
    lines = [
        f"[Step {record['step']}] Training metrics:",
        f"  Weighted CE loss: {_number(record['loss'], 3)}",
        "  Selection statistics:",
        f"    Overall ratio: {_percent(record['selection_ratio'])} "
        f"({_number(record['heads_per_position'], 2)} heads/position avg)",
        f"    Head 0 (t+1): {record['selected_count_head_0']} tokens "
        f"({_percent(record['selected_ratio_head_0'])} - always selected)",
    ]

    # The selecting heads, with their thresholds.
    for head in heads[1:]:
        lines.append(
            f"    Head {head} (t+{head + 1}): {record[f'selected_count_head_{head}']} tokens "
            f"({_percent(record[f'selected_ratio_head_{head}'])} - top-k, "
            f"threshold={_number(record[f'threshold_head_{head}'], 2)})"
        )

    if heads[1:]:
        means = ", ".join(f"t+{head + 1}={_number(record[f'excess_mean_head_{head}'], 2)}" for head in heads[1:])
        lines.append(f"  Avg excess loss: {means}")
    return "\n".join(lines)


def held_out_text(record: Record) -> str:
    """Format a validation for a line: loss per head, and what else head 0's loss means."""
    losses = " ".join(_number(record[f"loss_head_{head}"], 3) for head in _heads(record))
    bits = f", {_number(record['bits_per_byte'], 3)} bits per byte" if "bits_per_byte" in record else ""
    return f"per head {losses}; perplexity {_number(record['perplexity_head_0'], 2)}{bits}"


def summary_table(records: Sequence[Record], run_dir: Path, source_names: Sequence[str]) -> str:
    """Format the table that closes a run.

    Rows: held-out loss per head at the start and the end, for each set; the share selected per head over the last quarter of
    the steps; and for each named source its share in the data and among the selected pairs.
    """
    trained = [record for record in records if "split" not in record]
    if not trained:
        return ""
    heads = _heads(trained[-1])
    last_quarter = [record for record in trained if record["step"] > 0.75 * trained[-1]["step"]]

    # Held-out losses, of the first validation of each set and of the last.
    held_out: dict[str | None, list[Record]] = {}
    for record in records:
        if record.get("split") == "validation":
            held_out.setdefault(record.get("set"), []).append(record)
    rows = [["", *(f"head {head} (t+{head + 1})" for head in heads)]]
    for name, of_set in held_out.items():
        for when, record in (("start", of_set[0]), ("end", of_set[-1])):
            losses = [_number(record[f"loss_head_{head}"], 3) for head in heads]
            rows.append([f"held-out loss{f' of {name}' if name else ''}, {when} (step {record['step']})", *losses])

    # Shares over the last quarter: sum counts over its steps, then divide once.
    counts = {key: sum(record.get(key) or 0 for record in last_quarter) for key in trained[-1] if "_count_" in key}
    rows.append(
        ["selected", *(_percent(ratio(counts[f"selected_count_head_{h}"], counts[f"valid_count_head_{h}"])) for h in heads)]
    )
    if len(source_names) > 1:
        for name in source_names:
            for label, kind in (("in the data", "valid"), ("among selected", "selected")):
                parts = [(counts[f"{kind}_count_head_{h}_source_{name}"], counts[f"{kind}_count_head_{h}"]) for h in heads]
                rows.append([f"share of {name} {label}", *(_percent(ratio(part, whole)) for part, whole in parts)])

    first, last = last_quarter[0]["step"], last_quarter[-1]["step"]
    return "\n".join(
        [
            aligned(rows),
            f"(selection and shares: over the {len(last_quarter)} logged steps from {first} to {last})",
            "",
            f"run directory:  {run_dir}",
            f"look at it:     tensorboard --logdir {run_dir.parent}",
        ]
    )


def _heads(record: Record) -> list[int]:
    return [head for head in range(len(record)) if f"loss_head_{head}" in record]


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
