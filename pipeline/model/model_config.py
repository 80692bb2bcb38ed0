"""The config.json of a Hugging Face model folder: what it says is used, or refused by name.

The rules are transformers 5's, so that a folder means the same here as there: `rope_scaling` before `rope_parameters` before
`rope_theta`, and each family's defaults for keys that are absent. What this package does not compute exactly (kinds of scaled
rotary positions, sliding windows by layer, quantised weights) is an error, because ignoring it would silently give other
numbers. What is exact for short rows alone bounds their length (`longest_row`): a window over all layers, as Mistral's, and
`dynamic` positions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline.config import ModelSettings
from pipeline.model.rotary_config import UNSCALED, rope_kind, rope_of, scaling_of
from pipeline.model.transformer import attention_head_dim, ffn_dim
from pipeline.rope_settings import ROPE_SCALINGS
from pipeline.storage.lfs_pointer import pointer_problem

CONFIG_FILE = "config.json"

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
}
"""transformers' values of keys that are absent; a null means something else."""

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "rms_norm_eps")
"""Keys without which no model is meant, whatever transformers' default."""

_ONLY_SUPPORTED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "compression_config": None,
}
"""The only values supported of settings in config.json for features that this package does not implement."""
_BIASES = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
"""Keys that say which projections have a bias, and the families that heed them; Qwen2's queries, keys and values always do."""

_INTEGER, _NUMBER = (int, "a whole number"), ((int, float), "a number")
_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _INTEGER),
    **dict.fromkeys(("head_dim", "intermediate_size", "vocab_size", "num_prediction_heads"), _INTEGER),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), _INTEGER),
    "rope_theta": _NUMBER,
    **dict.fromkeys(("partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"), _NUMBER),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _NUMBER),
    "rms_norm_eps": _NUMBER,
    **dict.fromkeys(("tie_word_embeddings", "truncate", *_BIASES), (bool, "true or false")),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "auto_map"), (dict, "an object")),
    **dict.fromkeys(("layer_types", "architectures"), (list, "a list")),
}
"""The types of the keys that are read, and their names in messages; null is allowed as well."""
_ROTARY_KEYS = ("rope_theta", "partial_rotary_factor")
"""Keys that the rotary embedding's parameters and config.json itself may have."""


class ModelFilesError(ValueError):
    """A directory does not hold the model that is expected in it. The message is ready to be shown.

    `agreed` is true if all ranks raise the error together, with the same message.
    """

    agreed = False


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelFilesError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{file}: no such file") from None
    except OSError as error:
        raise ModelFilesError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(pointer_problem(file) or f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def settings_from_config(config: dict[str, Any], directory: Path) -> ModelSettings:
    """Return the shape of the model that a config.json describes.

    Raises:
        ModelFilesError: a value has the wrong type or makes no sense, or the model has a feature that this package does not
            implement exactly.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ModelFilesError(f"{directory}: model_type {model_type!r}; expected one of {', '.join(_MODEL_TYPES)}")
    problem = _wrong_type(config) or _wrong_type(rope_of(config))

    if problem is None:
        # Absent keys have the family's defaults; the rotary embedding's own parameters come before the keys beside it.
        config = _DEFAULTS[model_type] | config | {key: value for key, value in rope_of(config).items() if key in _ROTARY_KEYS}
        problem = _wrong_type(config) or _unsupported(config, model_type)
    if problem is not None:
        raise ModelFilesError(f"{directory}: {problem}")

    # The same checks as for a recipe's own model, then those of sizes that must divide one another.
    missing = next((key for key in _REQUIRED if config.get(key) is None), None)
    if missing is not None:
        raise ModelFilesError(f"{directory}: {CONFIG_FILE} lacks '{missing}'")
    try:
        settings = _shape(config, model_type)
    except ValidationError as error:
        problem = "; ".join(
            f"{'.'.join(map(str, detail['loc']))}: got {detail['input']!r}; {detail['msg']}" for detail in error.errors()
        )
    else:
        problem = impossible_heads(settings)
        if problem is None:
            return settings
    raise ModelFilesError(f"{directory}: {CONFIG_FILE} makes no sense: {problem}")


def _shape(config: dict[str, Any], model_type: str) -> ModelSettings:
    has_bias = config.get("attention_bias") or False
    return ModelSettings(
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        num_prediction_heads=num_heads_in_files(config),
        rope_theta=config.get("rope_theta", 10_000.0),
        norm_eps=config["rms_norm_eps"],
        rope_scaling=scaling_of(config),
        attention_bias=has_bias or model_type == "qwen2",
        attention_output_bias=has_bias,
        mlp_bias=config.get("mlp_bias") or False,
        qk_norm=model_type == "qwen3",
        tied_embeddings=config.get("tie_word_embeddings") or False,
    )


def num_heads_in_files(config: dict[str, Any]) -> int:
    """Return the number of prediction heads that the weights beside a config.json have, 1 for an ordinary model."""
    value = config.get("num_prediction_heads")
    return 1 if value is None else value


class LongestRow(NamedTuple):
    """Tokens that a row may have, the key of config.json that says so, and whether a longer row is another computation."""

    num_tokens: int
    key: str
    is_exact: bool


def longest_row(config: Mapping[str, Any]) -> LongestRow | None:
    """Return how long a row of the model that a valid config.json describes may be; None if it does not say."""
    is_dynamic = rope_kind(rope_of(config)) == "dynamic"
    known = {**_DEFAULTS[config["model_type"]], **config}
    positions = known["max_position_embeddings"] if is_dynamic else config.get("max_position_embeddings")
    limits = [] if positions is None else [LongestRow(positions, "max_position_embeddings", is_dynamic)]
    if config["model_type"] == "mistral" and known["sliding_window"] is not None:
        limits.append(LongestRow(known["sliding_window"], "sliding_window", True))
    return min(limits, default=None)


def _wrong_type(config: dict[str, Any]) -> str | None:
    """Describe the first key whose value has another type than transformers writes; None if there is none."""
    for key, (expected, name) in _TYPES.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool)):
            return f"{CONFIG_FILE} makes no sense: {key}: got {value!r}; expected {name}"
    return None


def _unsupported(config: dict[str, Any], model_type: str) -> str | None:
    """Describe the first feature that this package does not compute; None if there is none."""
    # Quantised weights, activations, windows. Of null they mean nothing.
    for key, supported in _ONLY_SUPPORTED.items():
        value = config.get(key)
        if value is not None and value != supported:
            remedy = "; use the weights before they were quantised" if supported is None else ""
            return f"{key} is {value!r} in {CONFIG_FILE}; only {supported!r} is supported{remedy}"
    ignored = [key for key, families in _BIASES.items() if config.get(key) and model_type not in families]
    if ignored:
        return f"{ignored[0]} is true in {CONFIG_FILE}, which {model_type} has no use for; only false is supported there"
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * (config.get("num_hidden_layers") or 0):
        return f"layer_types is {kinds} in {CONFIG_FILE}; only 'full_attention' for every layer is supported"

    # Rotary positions. Parameters by layer type are a dict in the dict.
    rope = rope_of(config)
    kind, known = rope_kind(rope), (*UNSCALED, *ROPE_SCALINGS)
    if kind not in known or any(isinstance(value, dict) for value in rope.values()):
        return f"rotary positions {rope} are not supported; expected one rope_type of {', '.join(known)} for all layers"

    # A classifier or an encoder of the same family, or a model whose code lies in the folder.
    expected = f"{model_type.capitalize()}ForCausalLM"
    named = config.get("architectures") or [expected]
    if named != [expected]:
        return f"architectures is {named} in {CONFIG_FILE}; only ['{expected}'], a causal language model, is supported"
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return f"auto_map in {CONFIG_FILE} names code of the folder's own, which is never executed; use a plain {model_type}"
    return None


def impossible_heads(settings: ModelSettings) -> str | None:
    """Describe why attention heads do not divide the width or one another; None if they do."""
    heads, groups = settings.num_attention_heads, settings.num_key_value_heads or settings.num_attention_heads
    if settings.head_dim is None and settings.dim % heads:
        return f"hidden_size {settings.dim} is no multiple of num_attention_heads {heads}"
    if heads % groups:
        return f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    if attention_head_dim(settings) % 2:
        return f"attention heads have the odd width {attention_head_dim(settings)}, which rotary positions cannot halve"
    return None


def config_of(settings: ModelSettings) -> dict[str, Any]:
    """Return the content of config.json for a model of this shape.

    Raises:
        ModelFilesError: no known model type has this combination of switches.

    Mistral's is written as Llama's, which computes the same on rows no longer than its window.
    """
    model_type = family_of(settings)
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": settings.dim,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_key_value_heads or settings.num_attention_heads,
        "head_dim": attention_head_dim(settings),
        "intermediate_size": ffn_dim(settings),
        "vocab_size": settings.vocab_size,
        "num_prediction_heads": settings.num_prediction_heads,
        "rope_theta": settings.rope_theta,
        **({} if settings.rope_scaling is None else {"rope_scaling": settings.rope_scaling.model_dump(exclude_none=True)}),
        **{key: True for key, families in _BIASES.items() if model_type in families and _has(settings, key)},
        "rms_norm_eps": settings.norm_eps,
        "tie_word_embeddings": settings.tied_embeddings,
        "hidden_act": "silu",
    }


def family_of(settings: ModelSettings) -> str:
    """Return the model type whose causal language model has these switches.

    Raises:
        ModelFilesError: there is none.
    """
    attention = (settings.attention_bias, settings.attention_output_bias)
    if attention == (True, False) and not (settings.qk_norm or settings.mlp_bias):
        return "qwen2"
    if attention[0] == attention[1] and not (settings.qk_norm and settings.mlp_bias):
        return "qwen3" if settings.qk_norm else "llama"
    on = [key for key in ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm") if getattr(settings, key)]
    raise ModelFilesError(
        f"{' and '.join(on)} alone are those of no family that a model could be exported as: llama has the two attention "
        "biases or neither, and may have mlp_bias; qwen3 (qk_norm) has the two or neither; qwen2 has attention_bias alone"
    )


def _has(settings: ModelSettings, key: str) -> bool:
    return settings.attention_output_bias if key == "attention_bias" else settings.mlp_bias
