"""Load and save causal language models in Hugging Face's layout (config.json, safetensors).

Trunk + head 0 is the ordinary model. Further prediction heads are saved beside it as `prediction_heads.N.…`, which other
readers report as unused. Weights are moved one tensor at a time, so a partitioned model is never whole on any rank. Only
safetensors are read, because loading a pickled checkpoint executes code.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pipeline.config import ModelSettings
from pipeline.model.mtp import Gather, MTPModel, no_gather
from pipeline.model.transformer import attention_head_dim, ffn_dim

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Bytes from which on a saved model is split into another file."""
_MAX_LISTED = 8

_TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "unembed.norm.weight": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_MODEL_TYPES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
"""model_type: (attention_bias, qk_norm) of `ModelSettings`."""

_ONLY_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}
"""The only values supported of settings in config.json for features that this package does not implement."""


class ModelFilesError(ValueError):
    """A directory does not hold the model that is expected in it."""


def read_model_settings(directory: Path) -> ModelSettings:
    """Read the shape of the model in `directory` from its config.json.

    Raises:
        ModelFilesError: files are missing, or the model has a feature that this package does not implement exactly.
    """
    _weight_files(directory)
    config = _read_json(directory / CONFIG_FILE)
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ModelFilesError(f"{directory}: model_type {model_type!r}; expected one of {', '.join(_MODEL_TYPES)}")
    attention_bias, qk_norm = _MODEL_TYPES[model_type]

    # Refuse what would silently give other numbers: scaled RoPE, other activations, sliding windows.
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ModelFilesError(f"{directory}: scaled rotary positions ({scaling}) are not supported")
    for key, value in _ONLY_SUPPORTED.items():
        if config.get(key, value) not in (value, None):
            raise ModelFilesError(f"{directory}: {key} is {config[key]!r} in {CONFIG_FILE}; only {value!r} is supported")

    try:
        return ModelSettings(
            dim=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            ffn_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            num_prediction_heads=config.get("num_prediction_heads", 1),
            rope_theta=config.get("rope_theta") or rope.get("rope_theta", 10_000.0),
            norm_eps=config["rms_norm_eps"],
            attention_bias=attention_bias,
            qk_norm=qk_norm,
            tied_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ModelFilesError(f"{directory}: {CONFIG_FILE} lacks {error}") from None
    except ValidationError as error:
        details = "; ".join(f"{detail['loc'][0]}: got {detail['input']!r}; {detail['msg']}" for detail in error.errors())
        raise ModelFilesError(f"{directory}: {CONFIG_FILE} makes no sense: {details}") from None


def load_weights(model: MTPModel, directory: Path, gather: Gather = no_gather) -> None:
    """Load the weights in `directory` into `model`, one tensor at a time; collective if the model is partitioned.

    Prediction heads that the files lack start as copies of the files' last block.

    Raises:
        ModelFilesError: a tensor is missing or has another shape. All are checked before the first is loaded, so that the
            ranks of a partitioned model raise together.
    """
    problems = weight_problems(model.settings, directory)
    if problems:
        raise ModelFilesError("; ".join(problems))
    with _opened_tensors(directory) as tensors:
        for name, parameter in model.named_parameters():
            with gather(parameter) as is_writer, torch.no_grad():
                if is_writer:
                    source = _source_name(name, model.settings, tensors)
                    parameter.copy_(tensors[source].get_tensor(source))


def weight_problems(settings: ModelSettings, directory: Path) -> list[str]:
    """List tensors of a model of `settings` that `directory` lacks or has in another shape, one sentence each.

    Reads only the files' headers.

    Raises:
        ModelFilesError: the files cannot be opened.
    """
    with torch.device("meta"):
        expected = MTPModel(settings)
    problems = []
    with _opened_tensors(directory) as tensors:
        for name, parameter in expected.named_parameters():
            source = _source_name(name, settings, tensors)
            shape = tensors[source].get_slice(source).get_shape() if source in tensors else None
            if shape is None:
                problems.append(f"{directory}: no tensor '{source}' for the model's '{name}'")
            elif shape != list(parameter.shape):
                problems.append(f"{directory}: '{source}' is {shape}, expected {list(parameter.shape)}")
    return problems[:_MAX_LISTED] + [f"… and {len(problems) - _MAX_LISTED} more"] * (len(problems) > _MAX_LISTED)


@contextmanager
def _opened_tensors(directory: Path) -> Iterator[dict[str, Any]]:
    """Open the weight files; yields the file that holds each tensor, by the tensor's name."""
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in _weight_files(directory):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            tensors |= dict.fromkeys(opened.keys(), opened)
        yield tensors


def save_model(model: MTPModel, directory: Path, gather: Gather = no_gather, writes: bool = True) -> None:
    """Save config.json and the weights, in the model's dtype, into an existing directory.

    Every rank of a partitioned model must call this; only the one with `writes` creates files.
    """
    # Weights go into files of about SHARD_BYTES; the None at the end of the parameters closes the last file.
    files: dict[str, str] = {}
    number, pending, pending_bytes = 0, {}, 0
    for name, parameter in _with_end(model.named_parameters()):
        if parameter is not None:
            with gather(parameter):
                if writes:
                    pending[_export_name(name, model.settings)] = parameter.detach().cpu().clone()
                    pending_bytes += parameter.numel() * parameter.element_size()
        if pending and (parameter is None or pending_bytes >= SHARD_BYTES):
            number += 1
            file = f"model-{number:05d}.safetensors"
            files |= dict.fromkeys(pending, file)
            save_file(pending, directory / file, metadata={"format": "pt"})
            pending, pending_bytes = {}, 0
    if not writes:
        return

    # One file has the plain name; several have an index.
    if number == 1:
        (directory / "model-00001.safetensors").rename(directory / WEIGHTS_FILE)
    else:
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    (directory / CONFIG_FILE).write_text(json.dumps(_export_config(model.settings) | {"torch_dtype": dtype}, indent=1))


def _with_end(items: Any) -> Iterator[tuple[str, nn.Parameter | None]]:
    """The items, then ("", None)."""
    yield from items
    yield "", None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{file}: no such file") from None
    except ValueError as error:
        raise ModelFilesError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{file}: expected a JSON object")
    return content


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ModelFilesError(f"{directory}: no such directory; expected a model ({CONFIG_FILE}, {WEIGHTS_FILE})")
    if (directory / INDEX_FILE).is_file():
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map", {})
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / WEIGHTS_FILE]
    expected = [directory / CONFIG_FILE, *files]
    missing = [file.name for file in expected if not file.is_file()]
    if missing:
        raise ModelFilesError(f"{directory}: missing {', '.join(missing)}; expected {CONFIG_FILE} and {WEIGHTS_FILE}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelFilesError(f"{file}: not a safetensors file: {error}") from None
    return files


def _source_name(name: str, settings: ModelSettings, available: Any) -> str:
    """Name of the tensor to load into parameter `name`: its own, or the last block's for a head that the files lack."""
    own = _export_name(name, settings)
    if name.startswith("heads.") and own not in available:
        return _export_name(f"heads.0.{name.split('.', 2)[2]}", settings)
    if name == "unembed.weight" and own not in available:
        # A file with tied embeddings has no unembedding; an untied model starts with two copies of the one matrix.
        return _TOP_NAMES["embed.weight"]
    return own


def _export_name(name: str, settings: ModelSettings) -> str:
    """Hugging Face's name of our parameter `name`: `heads.0.ffn.up.weight` -> `model.layers.LAST.mlp.up_proj.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    module_list, index, rest = name.split(".", 2)
    stem, kind = rest.rsplit(".", 1)
    block = f"{_BLOCK_NAMES[stem]}.{kind}"
    if module_list == "trunk":
        return f"model.layers.{index}.{block}"
    return f"model.layers.{settings.num_layers - 1}.{block}" if index == "0" else f"prediction_heads.{index}.{block}"


def _export_config(settings: ModelSettings) -> dict[str, Any]:
    kinds = {switches: model_type for model_type, switches in _MODEL_TYPES.items()}
    switches = (settings.attention_bias, settings.qk_norm)
    if switches not in kinds:
        raise ModelFilesError("attention_bias and qk_norm together are no known model type; it cannot be exported")
    model_type = kinds[switches]
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
        "rms_norm_eps": settings.norm_eps,
        "tie_word_embeddings": settings.tied_embeddings,
        "hidden_act": "silu",
    }
