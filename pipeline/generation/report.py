"""Report of `launch/generate.py`, printed and written: the ways of decoding, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.generation.decoding import Completion, Counts
from pipeline.runtime.table import aligned

COUNTED = "(a completion's first token comes from reading its prompt, and belongs to no step; drafts beyond its end count too)"
"""The reasons why tokens ÷ steps is not what is accepted per step."""


def figures(completions: Sequence[Completion], counts: Counts) -> dict[str, Any]:
    """Return the figures of one way of decoding.

    accepted_per_step: mean tokens that head 0 accepts in a step of a row, its own included, also beyond the end of a
    completion. acceptance_head_h: share of the steps in
    which head h's draft was accepted.
    """
    tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "tokens": tokens,
        "steps": counts.steps,
        "accepted_per_step": counts.accepted_per_step,
        **{f"acceptance_head_{head}": share for head, share in enumerate(counts.acceptance, 1)},
        "seconds": counts.seconds,
        "tokens_per_second": tokens / counts.seconds,
    }


def table(of_ways: Mapping[str, dict[str, Any]]) -> str:
    """Format the figures, a column for each way of decoding."""
    keys = max(of_ways.values(), key=len)
    rows = [["", *of_ways]]
    rows += [[key.replace("_", " "), *(_cell(found.get(key)) for found in of_ways.values())] for key in keys]
    return aligned(rows)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
