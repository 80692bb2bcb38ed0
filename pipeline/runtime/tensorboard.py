"""The runs, tags, charts and histograms by which TensorBoard shows the records of metrics.jsonl.

TensorBoard colours by run, not by tag. So each head is a run of its own below the run (`tensorboard/head_0` …), and the heads
share one tag a quantity: one card, with the heads in their colours and under their names. The same holds for sources
(`source_NAME`) and data sets (`set_NAME`); what two heads share is a curve of the second one, in a card of the first. All else
lies in the run itself. Groups of cards are sorted by name, and the first two are open: `selection`, `train`, then `validation`,
`wall_clock`, `z_data`.

Left out, and only in metrics.jsonl: constants (how many pairs there are, and are selected), and most statistics of single
sources.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.runtime.metrics import EXCESS_BIN_WIDTH, EXCESS_LOWEST, Record


class Place(NamedTuple):
    """A curve's place. run: the folder below `tensorboard`; "" for the run itself."""

    run: str
    tag: str


_TAGS = {
    "selected_ratio": "selection/ratio",
    "selection_ratio": "selection/ratio",
    "threshold": "selection/threshold",
    "excess_mean": "selection/excess_mean",
    "excess_p10": "selection/excess_p10",
    "excess_p90": "selection/excess_p90",
    "selected_loss": "selection/loss_of_selected",
    "rejected_loss": "selection/loss_of_rejected",
    "agreement": "selection/agreement",
    "prediction_hit_rate": "selection/prediction_hit_rate",
    "heads_per_position": "selection/heads_per_position",
    "tokens_per_second": "wall_clock/tokens_per_second",
    "seconds_per_step": "wall_clock/seconds_per_step",
    "seconds_saving": "wall_clock/seconds_saving",
    "mfu": "wall_clock/mfu",
    "memory_bytes": "wall_clock/memory_bytes",
    "data_wait": "wall_clock/data_wait",
    "tokens": "z_data/tokens",
    "corrupt_samples": "z_data/corrupt_samples",
}
"""Tags of training by quantity; that of any other is `train/` and its name."""
_TAGS_OF_SOURCES = {"selected_ratio": "selection/share", "enrichment": "selection/enrichment"}
_NOT_DRAWN = {"step", "samples", "split", "set", "rows", "time", "selected_count", "valid_count", "excess_p50"}
_RARE = {"skipped_steps", "rollbacks", "samples_skipped", "corrupt_samples"}
"""Counters of which nothing is drawn while they are 0."""
_IN_VALIDATION = {"excess_mean", "threshold"}
"""Quantities of a validation's selection that are drawn."""


def place_of(key: str, split: str | None = None) -> Place | None:
    """Return the run and the tag of a metric; None for what is not drawn.

    loss                                 the run itself   train/loss
    loss_head_0                          head_0           train/loss
    selected_ratio_head_1                head_1           selection/ratio
    agreement_head_1_head_2              head_2           selection/agreement/with_head_1
    selected_ratio_head_1_source_NAME    source_NAME      selection/share/head_1
    data_tokens_source_NAME              source_NAME      z_data/tokens
    loss_head_0, split="validation"      head_0           validation/loss
    loss_head_0_source_NAME, likewise    source_NAME      validation/loss/head_0
    bits_per_byte, likewise              the run itself   validation/bits_per_byte
    """
    if key.startswith("data_") and key != "data_wait":
        quantity, kind, name = _of_part(key.removeprefix("data_"))
        return Place(_run_of(kind, name), f"{split or 'z_data'}/{quantity}")

    key, source, name = key.partition("_source_")
    quantity, _, heads = key.partition("_head_")
    tag = _tag_of_source(quantity, heads, split) if source else _tag_of_all(quantity, split)
    if tag is None:
        return None
    if source:
        return Place(_run_of("source", name), tag)

    # Of all heads, of two, or of one.
    first, pair, second = heads.partition("_head_")
    if pair:
        return Place(f"head_{second}", f"{tag}/with_head_{first}")
    return Place(f"head_{first}" if first else "", tag)


def is_drawn(key: str, value: Any) -> bool:
    """Return whether a value is a point of its curve: there is one, and it is not the 0 of a rare event's counter."""
    return value is not None and not (key in _RARE and value == 0)


def split_of(record: Record) -> str | None:
    """Return the first part of a record's tags in TensorBoard: `validation`, or `validation_NAME` for a named set."""
    split, name = record.get("split"), record.get("set")
    return f"{split}_{name}" if name else split


def _of_part(key: str) -> tuple[str, str, str]:
    """Split a metric of the data into quantity, kind (`source`, `set` or "") and name."""
    found = re.search(r"_(source|set)_", key)
    return (key, "", "") if found is None else (key[: found.start()], found[1], key[found.end() :])


def _tag_of_all(quantity: str, split: str | None) -> str | None:
    """The tag of a metric of all sources; None for what is not drawn."""
    tag = _TAGS.get(quantity, f"train/{quantity}")
    if quantity in _NOT_DRAWN:
        return None
    if split is None:
        return tag
    return None if tag.startswith("selection/") and quantity not in _IN_VALIDATION else f"{split}/{quantity}"


def _tag_of_source(quantity: str, head: str, split: str | None) -> str | None:
    """The tag of a source's metric: its selection by the heads that select, and in a validation bits per byte and each head's
    loss."""
    if split is not None and quantity == "bits_per_byte":
        return f"{split}/bits_per_byte"
    if split is not None:
        return f"{split}/loss/head_{head}" if quantity == "loss" and head else None
    tag = _TAGS_OF_SOURCES.get(quantity)
    return None if tag is None or head in ("", "0") else f"{tag}/head_{head}"


def _run_of(kind: str, name: str) -> str:
    """The folder of a source or set, whatever its name holds; "" without one."""
    unsafe = r"[/%\\\x00-\x1f]"
    return f"{kind}_" + re.sub(unsafe, lambda found: f"%{ord(found[0]):02x}", name) if kind else ""


_OF_ALL = ": by head, and the objective (.)"
"""The rest of the title of a chart of losses, in which the run itself has the objective."""


def chart_layout(num_heads: int, held_out: Sequence[str]) -> dict[str, Any]:
    """Lay out TensorBoard's custom scalars: charts of heads, then of sources; the selected ratio, which a schedule moves, comes
    last. Tags are regular expressions, but not those of a band."""
    splits = [split_of({"split": "validation", "set": name}) or "" for name in held_out]
    heads = {
        f"policy loss{_OF_ALL}": _lines("train/loss"),
        **{f"held-out loss ({split}){_OF_ALL}": _lines(f"{split}/loss") for split in splits},
        "excess loss: mean, and the band from the 10th to the 90th percentile": [
            "Margin",
            ["selection/excess_mean", "selection/excess_p10", "selection/excess_p90"],
        ],
        "threshold of the excess loss": _lines("selection/threshold"),
        "policy loss of selected and of rejected pairs": _lines("selection/loss_of_selected", "selection/loss_of_rejected"),
        **{
            f"agreement with head {head}: pairs that both heads select, of those that either selects": _lines(
                "selection/agreement", f"selection/agreement/with_head_{head}"
            )
            for head in range(1, num_heads - 1)
        },
    }
    sources = {
        f"enrichment by head {head}: a source's share of the selected pairs over its share of the data": _lines(
            f"selection/enrichment/head_{head}"
        )
        for head in range(1, num_heads)
    }
    return {"heads": heads, "sources": sources, "ratio": {"selected ratio": _lines("selection/ratio")}}


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]


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
