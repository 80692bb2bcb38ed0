"""The rotary positions that a Hugging Face config.json describes, by transformers 5's rules."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.rope_settings import ROPE_SCALINGS

UNSCALED = ("default", "dynamic")
"""Kinds of rotary positions that are plain; `dynamic` ones are up to `max_position_embeddings`."""


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embedding: all of `rope_scaling`, or of `rope_parameters` where that is empty."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_kind(rope: Mapping[str, Any]) -> Any:
    """The kind of rotary positions, whatever its type: `rope_type`, or `type` in older files."""
    return rope.get("rope_type", rope.get("type", "default"))


def scaling_of(config: Mapping[str, Any]) -> Any:
    """The value of `model.rope_scaling`, with transformers' values for keys that are absent or null; None without scaling."""
    rope = rope_of(config)
    kind = rope_kind(rope)
    if kind in UNSCALED:
        return None
    keys = ROPE_SCALINGS[kind].model_fields
    found = {key: value for key, value in rope.items() if key in keys and value is not None} | {"rope_type": kind}

    # The positions before scaling; a key of config.json itself comes first.
    positions, original = config.get("max_position_embeddings"), config.get("original_max_position_embeddings")
    if "original_max_position_embeddings" in keys:
        found["original_max_position_embeddings"] = original or found.get("original_max_position_embeddings", positions)
    if kind == "yarn":
        found = _yarn(found, rope, positions)
    return found


def _yarn(found: dict[str, Any], rope: Mapping[str, Any], positions: int | None) -> dict[str, Any]:
    """Fill in what YaRN derives: the factor from the positions, the attention factor from DeepSeek's two `mscale`."""
    original = found["original_max_position_embeddings"]
    if "factor" not in found and original and positions:
        found["factor"] = positions / original
    factor: Any = found.get("factor")
    scales = [scale for scale in (rope.get("mscale"), rope.get("mscale_all_dim")) if scale]
    if "attention_factor" not in found and len(scales) == 2 and factor:
        above, below = (0.1 * scale * math.log(max(factor, 1)) + 1.0 for scale in scales)
        found["attention_factor"] = above / below
    return found
