"""What may not change between a run and its continuation: settings by their flat names, `section.key`."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import Settings

# What the position of a run, one integer, is counted in: never free to change.
POSITION = ("data.global_batch", "data.lanes")

# Settings that may differ between a run and its continuation: they do not change what is computed.
# Directories may move; the fingerprints of what is in them are compared instead.
FREE_TO_CHANGE = (
    "run.", "logging.", "checkpoint.", "data.num_workers", "data.path", "data.mixture", "data.builtin", "data.validation_path",
    "data.on_corrupt", "data.retry_seconds", "data.cache_", "data.allow_pipe", "reference.path", "reference.sharding",
    "reference.cached",
    "reference.training_", "model.pretrained", "training.selection_exchange", "training.check_ranks_every",
    "training.max_skipped_steps", "training.activation_checkpointing",
)  # fmt: skip


def differences_that_matter(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Settings (flat, `section.key`) that differ and change the result of a run, one sentence each."""
    keys = dict.fromkeys([*before, *after])
    return [
        f"{key}: was {before.get(key)!r}, is now {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]


def flatten(settings: Settings) -> dict[str, Any]:
    """`{"section.key": value}` with JSON values."""
    dumped = settings.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in dumped.items() for key, value in keys.items()}
