"""Load causal language models in Hugging Face's layout (config.json, safetensors); `export` writes them.

Trunk + head 0 is the ordinary model. Further prediction heads are tensors `prediction_heads.N.…` of a file beside it; older
exports have them among the model's own. Weights are moved one tensor at a time, so a partitioned model is never whole on any
rank. Only safetensors are read, because loading a pickled checkpoint executes code.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.model_config import (
    CONFIG_FILE,
    LongestRow,
    ModelFilesError,
    longest_row,
    num_heads_in_files,
    read_json,
    settings_from_config,
)
from pipeline.model.mtp import Gather, MTPModel, initialize_parameter, no_gather
from pipeline.model.weight_files import Weights, opened_tensors, weight_files

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
_DTYPES = ("F64", "F32", "F16", "BF16")
"""Tensors of plain numbers, by safetensors' names. FP8 and integers mean something only together with their scales."""
_UNUSED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|prediction_heads\.\d+\..*")
"""Tensors that a model may leave: what older saves kept of the rotary positions, and heads that it does not have."""


def read_model_settings(directory: Path) -> ModelSettings:
    """Read the shape of the model in `directory` from its config.json.

    Raises:
        ModelFilesError: files are missing, or the model has a feature that this package does not implement exactly.
    """
    weight_files(directory)
    return settings_from_config(read_json(directory / CONFIG_FILE), directory)


def read_longest_row(directory: Path) -> LongestRow | None:
    """Read how many tokens a row of the model in `directory` may have; None if it does not say.

    Raises:
        ModelFilesError: as `read_model_settings`.
    """
    config = read_json(directory / CONFIG_FILE)
    settings_from_config(config, directory)
    return longest_row(config)


def model_files(directory: Path) -> list[Path]:
    """List the files that decide what the model in `directory` computes: its weights, then config.json.

    Raises:
        ModelFilesError: as `read_model_settings`.
    """
    return [*weight_files(directory), directory / CONFIG_FILE]


class FolderWeights:
    """The weights of a model folder, by our names.

    Raises:
        ModelFilesError: the folder does not hold the model that its config.json describes.
    """

    def __init__(self, directory: Path):
        self.settings = read_model_settings(directory)
        problems = weight_problems(self.settings, directory)
        if problems:
            raise ModelFilesError("; ".join(problems))
        self._files: dict[str, Path] = {}
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def tensor(self, name: str) -> Tensor:
        """Read a parameter by its name in the model, in the dtype of the file."""
        source = export_name(name, self.settings)
        with safe_open(self._files[source], framework="pt") as opened:
            return opened.get_tensor(source)


def copy_weights(model: MTPModel, weights: Weights) -> None:
    """Copy weights into a model that is not partitioned, one tensor at a time."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))


def load_weights(model: MTPModel, directory: Path, gather: Gather = no_gather) -> list[str]:
    """Load the weights in `directory` into `model`, one tensor at a time; collective if the model is partitioned.

    Prediction heads that the files lack start as copies of the files' last block, or freshly initialised, as `model.new_heads`
    says.

    Returns:
        The names of the tensors in which a value is not finite in the model's dtype, found by the ranks that read the files.

    Raises:
        ModelFilesError: as `weight_problems`. All are checked before the first is loaded, so that the ranks of a partitioned
            model raise together.
    """
    problems = weight_problems(model.settings, directory)
    if problems:
        raise ModelFilesError("; ".join(problems))
    num_heads, not_finite = _num_heads(directory), []
    with opened_tensors(directory) as tensors:
        for name, parameter in model.named_parameters():
            with gather(parameter) as is_writer, torch.no_grad():
                if is_writer and model.settings.new_heads == "fresh" and _is_new(name, num_heads):
                    initialize_parameter(model.settings, name, parameter)
                elif is_writer:
                    source = _source_name(name, model.settings, num_heads)
                    parameter.copy_(tensors[source].get_tensor(source))
                    if not torch.isfinite(parameter).all():
                        not_finite.append(source)
    return list(dict.fromkeys(not_finite))


def weight_problems(settings: ModelSettings, directory: Path) -> list[str]:
    """List what speaks against loading the tensors in `directory` into a model of `settings`, one sentence each.

    A tensor is missing, has another shape, is not of plain numbers, or is there and would be ignored. Reads only the files'
    headers, and the unembedding where the embedding is to take its place.

    Raises:
        ModelFilesError: the files cannot be opened.
    """
    num_heads = _num_heads(directory)
    with opened_tensors(directory) as tensors:
        # Counts first: a model of a billion layers cannot even be listed.
        problems = list(_count_problems(settings, num_heads, tensors)) or list(_tensor_problems(settings, num_heads, tensors))
    listed = [f"{directory}: {problem}" for problem in problems[:_MAX_LISTED]]
    return listed + [f"… and {len(problems) - _MAX_LISTED} more"] * (len(problems) > _MAX_LISTED)


def _count_problems(settings: ModelSettings, num_heads: int, tensors: Iterable[str]) -> Iterator[str]:
    """Compare the numbers of layers and heads that config.json names with those that have tensors."""
    for key, expected, prefix, first in (
        ("num_hidden_layers", settings.num_layers, "model.layers", 0),
        ("num_prediction_heads", num_heads, "prediction_heads", 1),
    ):
        found = {match[1] for match in map(re.compile(rf"{prefix}\.(\d+)\.").match, tensors) if match}
        if len(found) + first != expected:
            yield f"{key} is {expected} in {CONFIG_FILE}, the files have {len(found) + first}"


def _tensor_problems(settings: ModelSettings, num_heads: int, tensors: dict[str, Any]) -> Iterator[str]:
    """Compare the tensors with the parameters of a model of `settings`."""
    # Each parameter has a tensor of its shape.
    with torch.device("meta"):
        expected = MTPModel(settings)
    used = set()
    for name, parameter in expected.named_parameters():
        source = _source_name(name, settings, num_heads)
        used.add(source)
        if source not in tensors:
            yield f"no tensor '{source}' for the model's '{name}'"
            continue
        found = tensors[source].get_slice(source)
        if found.get_shape() != list(parameter.shape):
            yield f"'{source}' is {found.get_shape()}, expected {list(parameter.shape)}"
        elif found.get_dtype() not in _DTYPES:
            yield f"'{source}' is {found.get_dtype()}, expected one of {', '.join(_DTYPES)}"

    # A tied model takes the embedding for the unembedding, so one of its own must equal it.
    embedding, unembedding = _TOP_NAMES["embed.weight"], _TOP_NAMES["unembed.weight"]
    if settings.tied_embeddings and unembedding in tensors and embedding in tensors:
        used.add(unembedding)
        if not _equal(tensors, embedding, unembedding):
            yield (
                f"tie_word_embeddings is true in {CONFIG_FILE}, but '{unembedding}' differs from '{embedding}'; set it to "
                "false to keep both, or remove the one"
            )

    # Nothing else is left over.
    for name in sorted(set(tensors) - used):
        if not _UNUSED.fullmatch(name):
            yield f"'{name}' has no place in the model that {CONFIG_FILE} describes, which would ignore it"


def _equal(tensors: dict[str, Any], one: str, other: str, num_rows: int = 4096) -> bool:
    """True if two matrices are equal; read some rows at a time."""
    slices = tensors[one].get_slice(one), tensors[other].get_slice(other)
    shape, other_shape = (part.get_shape() for part in slices)
    return shape == other_shape and all(
        torch.equal(*(part[start : start + num_rows].float() for part in slices)) for start in range(0, shape[0], num_rows)
    )


def _num_heads(directory: Path) -> int:
    return num_heads_in_files(read_json(directory / CONFIG_FILE))


def _source_name(name: str, settings: ModelSettings, num_heads: int) -> str:
    """Name of the tensor to load into parameter `name`: its own, or the last block's for heads that the files lack."""
    if _is_new(name, num_heads):
        name = f"heads.0.{name.split('.', 2)[2]}"
    return export_name(name, settings)


def _is_new(name: str, num_heads: int) -> bool:
    """True of a parameter of a prediction head that the files lack."""
    module_list, _, rest = name.partition(".")
    return module_list == "heads" and int(rest.partition(".")[0]) >= num_heads


def export_name(name: str, settings: ModelSettings) -> str:
    """Hugging Face's name of our parameter `name`: `heads.0.ffn.up.weight` -> `model.layers.LAST.mlp.up_proj.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    module_list, index, rest = name.split(".", 2)
    stem, kind = rest.rsplit(".", 1)
    block = f"{_BLOCK_NAMES[stem]}.{kind}"
    if module_list == "trunk":
        return f"model.layers.{index}.{block}"
    return f"model.layers.{settings.num_layers - 1}.{block}" if index == "0" else f"prediction_heads.{index}.{block}"
