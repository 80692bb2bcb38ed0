"""The tags, charts and histograms by which TensorBoard shows the records of metrics.jsonl."""

import re
from collections.abc import Sequence
from typing import Any

from pipeline.runtime.metrics import EXCESS_BIN_WIDTH, EXCESS_LOWEST, Record


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


def chart_layout(num_heads: int, held_out: Sequence[str]) -> dict[str, Any]:
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


def histogram_arguments(counts: list[float], first: int, last: int) -> dict[str, Any]:
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
