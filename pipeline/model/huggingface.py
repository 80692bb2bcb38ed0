"""Load causal language models from safetensors in Hugging Face's layout, or Meta's (`layout`); `export` writes the former.

Trunk + head 0 is the ordinary model. Further prediction heads are tensors `prediction_heads.N.…` of a file beside it; older
exports have them among the model's own. Weights are moved one tensor at a time, so a partitioned model is never whole on any
rank. Only safetensors are read, because loading a pickled checkpoint executes code.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.layout import Layout, described_settings, layout_of, read_model_settings
from pipeline.model.model_config import CONFIG_FILE, ModelFilesError
from pipeline.model.mtp import Gather, MTPModel, initialize_parameter, no_gather
from pipeline.model.weight_files import Weights, opened_tensors, weight_files

_MAX_LISTED = 8

_DTYPES = ("F64", "F32", "F16", "BF16")
"""Tensors of plain numbers, by safetensors' names. FP8 and integers mean something only together with their scales."""
_UNUSED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs|(prediction_heads|extra_heads)\.\d+\..*")
"""Tensors that a model may leave: what older saves kept of the rotary positions, and heads that it does not have."""


def model_files(directory: Path) -> list[Path]:
    """List the files that decide what the model in `directory` computes: its weights, then what describes it.

    Raises:
        ModelFilesError: as `read_model_settings`.
    """
    return [*weight_files(directory), directory / layout_of(directory).description]


class FolderWeights:
    """The weights of a model folder, by our names.

    Raises:
        ModelFilesError: the folder does not hold the model that it describes.
    """

    def __init__(self, directory: Path):
        self.settings, self._layout = read_model_settings(directory), layout_of(directory)
        problems = weight_problems(self.settings, directory)
        if problems:
            raise ModelFilesError("; ".join(problems))
        self._files: dict[str, Path] = {}
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    @property
    def is_bfloat16(self) -> bool:
        """True if the embedding is stored in bfloat16."""
        source = self._layout.source_name("embed.weight", self.settings)
        with safe_open(self._files[source], framework="pt") as opened:
            return bool(opened.get_slice(source).get_dtype() == "BF16")

    def tensor(self, name: str) -> Tensor:
        """Read a parameter by its name in the model, in the dtype of the file."""
        source = self._layout.source_name(name, self.settings)
        with safe_open(self._files[source], framework="pt") as opened:
            return self._layout.arranged(name, opened.get_tensor(source), self.settings)


def copy_weights(model: MTPModel, weights: Weights) -> None:
    """Copy weights into a model that is not partitioned, one tensor at a time.

    Raises:
        ModelFilesError: a value is not finite in the model's dtype.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
            check_finite(name, parameter)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ModelFilesError if a value of a parameter is not finite, with which every loss and every logit would be NaN."""
    if not _is_finite(tensor):
        raise ModelFilesError(f"{name}: values that are not finite (NaN or infinite); every loss would be NaN")


def _is_finite(tensor: Tensor) -> bool:
    """True if all values are finite; found by their extremes, which takes no memory beside the tensor."""
    return tensor.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


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
    layout, num_heads, not_finite = layout_of(directory), described_settings(directory).num_prediction_heads, []
    with opened_tensors(directory) as tensors:
        for name, parameter in model.named_parameters():
            with gather(parameter) as is_writer, torch.no_grad():
                if is_writer and model.settings.new_heads == "fresh" and _is_new(name, num_heads):
                    initialize_parameter(model.settings, name, parameter)
                elif is_writer:
                    source = layout.source_name(_name_in_files(name, num_heads), model.settings)
                    parameter.copy_(layout.arranged(name, tensors[source].get_tensor(source), model.settings))
                    if not _is_finite(parameter):
                        not_finite.append(source)
    return list(dict.fromkeys(not_finite))


def weight_problems(settings: ModelSettings, directory: Path) -> list[str]:
    """List what speaks against loading the tensors in `directory` into a model of `settings`, one sentence each.

    A tensor is missing, has another shape, is not of plain numbers, or is there and would be ignored. Reads only the files'
    headers, and the unembedding where the embedding is to take its place.

    Raises:
        ModelFilesError: the files cannot be opened.
    """
    layout, num_heads = layout_of(directory), described_settings(directory).num_prediction_heads
    with opened_tensors(directory) as tensors:
        # Counts first: a model of a billion layers cannot even be listed.
        problems = list(_count_problems(layout, settings, num_heads, tensors)) or list(
            _tensor_problems(layout, settings, num_heads, tensors)
        )
    listed = [f"{directory}: {problem}" for problem in problems[:_MAX_LISTED]]
    return listed + [f"… and {len(problems) - _MAX_LISTED} more"] * (len(problems) > _MAX_LISTED)


def _count_problems(layout: Layout, settings: ModelSettings, num_heads: int, tensors: Iterable[str]) -> Iterator[str]:
    """Compare the numbers of layers and heads that the folder's description names with those that have tensors."""
    described = {layout.layers: settings.num_layers, layout.heads: num_heads - 1}
    found = {
        prefix: len({match[1] for match in map(re.compile(rf"{prefix}\.(\d+)\.").match, tensors) if match})
        for prefix in described
    }
    for key, prefixes, more in layout.counts:
        expected, there = (sum(each[prefix] for prefix in prefixes) + more for each in (described, found))
        if expected != there:
            yield f"{key} is {expected} in {layout.description}, the files have {there}"


def _tensor_problems(layout: Layout, settings: ModelSettings, num_heads: int, tensors: dict[str, Any]) -> Iterator[str]:
    """Compare the tensors with the parameters of a model of `settings`."""
    # Each parameter has a tensor of its shape.
    with torch.device("meta"):
        expected = MTPModel(settings)
    used = set()
    for name, parameter in expected.named_parameters():
        source = layout.source_name(_name_in_files(name, num_heads), settings)
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
    embedding, unembedding = (layout.source_name(name, settings) for name in ("embed.weight", "unembed.weight"))
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
            yield f"'{name}' has no place in the model that {layout.description} describes, which would ignore it"


def _equal(tensors: dict[str, Any], one: str, other: str, num_rows: int = 4096) -> bool:
    """True if two matrices are equal; read some rows at a time."""
    slices = tensors[one].get_slice(one), tensors[other].get_slice(other)
    shape, other_shape = (part.get_shape() for part in slices)
    return shape == other_shape and all(
        torch.equal(*(part[start : start + num_rows].float() for part in slices)) for start in range(0, shape[0], num_rows)
    )


def _name_in_files(name: str, num_heads: int) -> str:
    """Our name of the parameter that the files have for `name`: itself, or the last block's for heads that the files lack."""
    return f"heads.0.{name.split('.', 2)[2]}" if _is_new(name, num_heads) else name


def _is_new(name: str, num_heads: int) -> bool:
    """True of a parameter of a prediction head that the files lack."""
    module_list, _, rest = name.partition(".")
    return module_list == "heads" and int(rest.partition(".")[0]) >= num_heads
