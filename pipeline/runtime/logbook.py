"""Write metrics to metrics.jsonl and TensorBoard, and format them for the terminal. First rank only.

metrics.jsonl and TensorBoard hold the same values. When a run resumes, records after its checkpoint are dropped from both,
because those steps are trained again.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from pipeline.runtime.metrics import EXCESS_BIN_WIDTH, EXCESS_LOWEST, Record, Totals, ratio
from pipeline.runtime.table import aligned
from pipeline.storage.json_lines import read_json_lines
from pipeline.storage.whole_file import naming, sync_file, write_file

METRICS_FILE = "metrics.jsonl"


class Logbook:
    """Writer of one run directory's metrics.


    first_step: the step resumed from; 0 is a new run, which keeps no old record. notes: what was wrong with the file, or is
    lost of it, a sentence each.
    held_out: names of the held-out sets; "" for an only one.
    """

    def __init__(self, run_dir: Path, first_step: int, num_heads: int, held_out: Sequence[str] = ("",)):
        # Cut metrics.jsonl to the checkpoint; SummaryWriter's purge_step does the same for TensorBoard.
        path = run_dir / METRICS_FILE
        records, num_damaged = _read(path)
        kept = [record for record in records if 0 < first_step >= record["step"]]
        self.notes = _notes(records, num_damaged, first_step)
        write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.file: TextIO = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else 0)
        if num_heads > 1:
            self.board.add_custom_scalars(_layout(num_heads, held_out))

    def write(self, record: Record) -> None:
        """Append a record to metrics.jsonl and its values to TensorBoard."""
        with naming(Path(self.file.name)):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        with naming(Path(self.board.log_dir)):
            for key, value in record.items():
                tag = tensorboard_tag(key, split_of(record))
                if tag is not None and value is not None:
                    self.board.add_scalar(tag, value, record["step"])

    def sync(self) -> None:
        """Have on the disk what was written so far."""
        self.board.flush()
        os.fsync(self.file.fileno())
        for path in Path(self.board.log_dir).glob("events.*"):
            sync_file(path)

    def write_histograms(self, step: int, totals: Totals) -> None:
        """Add a histogram of each selecting head's excess loss to TensorBoard."""
        for head, counts_V in enumerate(totals.whole.histogram_KV, start=1):
            filled = counts_V.nonzero().flatten().tolist()
            if filled:
                self.board.add_histogram_raw(
                    f"selection/excess/head_{head}", global_step=step, **_histogram(counts_V.tolist(), filled[0], filled[-1])
                )

    def close(self) -> None:
        self.file.close()
        with naming(Path(self.board.log_dir)):
            self.board.close()


def read_records(run_dir: Path) -> list[Record]:
    """Read metrics.jsonl; lines that a kill or a loss of power left damaged are skipped."""
    return _read(run_dir / METRICS_FILE)[0]


def _read(path: Path) -> tuple[list[Record], int]:
    """(the records of a metrics.jsonl, the number of lines that are none)."""
    records = [line.value for line in read_json_lines(path)]
    whole = [record for record in records if record is not None and isinstance(record.get("step"), int)]
    return whole, len(records) - len(whole)


def _notes(records: Sequence[Record], num_damaged: int, first_step: int) -> list[str]:
    """Say what a start from `first_step` drops or misses of the records that are there."""
    last = max((record["step"] for record in records), default=0)
    notes = []
    if num_damaged:
        notes.append(f"{METRICS_FILE}: {num_damaged} damaged line(s) left out")
    if last > first_step:
        notes.append(f"{METRICS_FILE}: cut to step {first_step}, where the run continues; it went on to step {last}")
    if 0 < last < first_step:
        notes.append(
            f"{METRICS_FILE}: ends at step {last}, before the checkpoint of step {first_step}: what lay between is lost"
        )
    return notes


def split_of(record: Record) -> str | None:
    """Return the first part of a record's tags in TensorBoard: `validation`, or `validation_NAME` for a named set."""
    split, name = record.get("split"), record.get("set")
    return f"{split}_{name}" if name else split


_TAGS = {
    "loss": "loss",
    "selected_ratio": "selection/ratio",
    "selected_count": "selection/count",
    "valid_count": "selection/valid",
    "threshold": "selection/threshold",
    "excess_mean": "selection/excess_mean",
    "excess_p10": "selection/excess_p10",
    "excess_p50": "selection/excess_p50",
    "excess_p90": "selection/excess_p90",
    "selected_loss": "selection/loss_of_selected",
    "rejected_loss": "selection/loss_of_rejected",
    "agreement": "selection/agreement",
    "prediction_hit_rate": "selection/prediction_hit_rate",
    "selection_ratio": "selection/selection_ratio",
    "heads_per_position": "selection/heads_per_position",
}


def tensorboard_tag(key: str, split: str | None = None) -> str | None:
    """Map a metric's key to its TensorBoard tag; None for what is not a curve, such as `step`.

    loss_head_0                          loss/head_0
    selected_ratio_head_1                selection/ratio/head_1
    selected_ratio_head_1_source_NAME    source/NAME/selected_ratio/head_1
    excess_mean                          selection/excess_mean
    data_tokens_source_NAME              data/tokens/source_NAME
    loss, learning_rate                  train/loss, train/learning_rate
    loss_head_0 with split="validation"  validation/loss/head_0
    perplexity_head_0, likewise          validation/perplexity/head_0
    bits_per_byte, likewise              validation/bits_per_byte
    """
    if key in ("step", "split", "set", "rows"):
        return None
    if key.startswith("data_") or key == "corrupt_samples":
        tag = f"data/{key.removeprefix('data_').replace('_source_', '/source_', 1).replace('_set_', '/set_', 1)}"
        return f"{split}/{tag}" if split else tag

    key, source, name = key.partition("_source_")
    quantity, head, number = key.partition("_head_")
    if source:
        tag = f"source/{name}/{quantity}"
    elif quantity == "loss" and not head:
        tag = "train/loss"
    else:
        tag = _TAGS.get(quantity, f"train/{quantity}")
    tag += f"/head_{number}" if head else ""
    return f"{split}/{tag.removeprefix('train/')}" if split else tag


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


def held_out_text(record: Record) -> str:
    """Format a validation for a line: loss per head, and what else head 0's loss means."""
    losses = " ".join(_number(record[f"loss_head_{head}"], 3) for head in _heads(record))
    bits = f", {_number(record['bits_per_byte'], 3)} bits per byte" if "bits_per_byte" in record else ""
    return f"per head {losses}; perplexity {_number(record['perplexity_head_0'], 2)}{bits}"


def without_non_finite(record: Record) -> Record:
    """Replace non-finite values by None, because JSON has no NaN."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}


def _heads(record: Record) -> list[int]:
    return [head for head in range(len(record)) if f"loss_head_{head}" in record]


def _layout(num_heads: int, held_out: Sequence[str]) -> dict[str, Any]:
    """TensorBoard's custom scalars: one chart per quantity with all heads, one per head with all sources. Tags are regexes."""
    charts = {
        "policy loss": ("loss", 0),
        "selected ratio": ("selection/ratio", 0),
        "selected count": ("selection/count", 0),
        "threshold": ("selection/threshold", 1),
        "mean excess loss": ("selection/excess_mean", 1),
    }
    for name in held_out:
        split = split_of({"split": "validation", "set": name})
        charts[f"held-out loss of {name}" if name else "held-out loss"] = (f"{re.escape(split or '')}/loss", 0)

    # Title -> a chart of the tags that match these regular expressions.
    by_head = {
        title: ["Multiline", [f"^{tag}/head_{head}$" for head in range(first_head, num_heads)]]
        for title, (tag, first_head) in charts.items()
    }
    by_source = {
        f"selected ratio of each source, head {head}": ["Multiline", [f"^source/.*/selected_ratio/head_{head}$"]]
        for head in range(1, num_heads)
    }
    return {"heads": by_head, "sources": by_source}


def _histogram(counts: list[float], first: int, last: int) -> dict[str, Any]:
    """Arguments of `add_histogram_raw` from bin counts, cut to [first, last]; the moments are those of the bins' centres."""
    counts = counts[first : last + 1]
    middles = [EXCESS_LOWEST + (first + number + 0.5) * EXCESS_BIN_WIDTH for number in range(len(counts))]
    return {
        "min": middles[0] - EXCESS_BIN_WIDTH / 2,
        "max": middles[-1] + EXCESS_BIN_WIDTH / 2,
        "num": sum(counts),
        "sum": sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        "sum_squares": sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        "bucket_limits": [middle + EXCESS_BIN_WIDTH / 2 for middle in middles],
        "bucket_counts": counts,
    }


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
