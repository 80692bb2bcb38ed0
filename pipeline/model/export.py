"""Write models in Hugging Face's layout: trunk + head 0 as an ordinary causal language model, the other heads beside it.

    config.json, generation_config.json   the shape, the context length, the ids of the end of a document, BOS and padding
    model.safetensors                     the ordinary model; a large one in several files, with an index
    mtp_heads.safetensors                 prediction heads 1, 2, …, as tensors `prediction_heads.N.…`

Names, shapes and dtype say where every tensor lies before any is there. The files are therefore made first, and each tensor
goes straight to its place: one at a time is in memory, in whatever order they come.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.layout import export_name
from pipeline.model.model_config import CONFIG_FILE, config_of
from pipeline.model.mtp import Gather, MTPModel, no_gather
from pipeline.model.weight_files import HEADS_FILE, INDEX_FILE, WEIGHTS_FILE
from pipeline.storage.whole_file import naming, sync_file, write_file

GENERATION_CONFIG_FILE = "generation_config.json"
SHARD_BYTES = 5 * 10**9
"""Bytes from which on a saved model is split into another file."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TextConventions:
    """Conventions of a model's text: the tokens of a row (T), and the ids of special tokens. bos_id: None without one."""

    context_length: int
    end_of_document_id: int
    bos_id: int | None
    pad_id: int

    @property
    def special_ids(self) -> dict[str, int | None]:
        """The keys of config.json and generation_config.json. Of absent ones transformers makes up ids."""
        return {"bos_token_id": self.bos_id, "eos_token_id": self.end_of_document_id, "pad_token_id": self.pad_id}


def save_model(
    model: MTPModel,
    directory: Path,
    gather: Gather = no_gather,
    writes: bool = True,
    text: TextConventions | None = None,
) -> None:
    """Save a model in its own dtype into an existing directory.

    Every rank of a partitioned model must call this; only the one with `writes` creates files.
    """
    values = _gathered(model, gather)
    if writes:
        dtype = next(model.parameters()).dtype
        write_model(directory, model.settings, dtype, values, text)
    for _ in values:
        pass  # Each rank takes part in gathering every parameter.


def write_model(
    directory: Path,
    settings: ModelSettings,
    dtype: torch.dtype,
    values: Iterable[tuple[str, Tensor]],
    text: TextConventions | None = None,
) -> None:
    """Write weights and configuration into an existing directory, config.json last.

    values: every parameter of `MTPModel(settings)` once, (name, tensor), cast to `dtype` when it is written.
    """
    config = config_of(settings) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    files = weight_layout(settings, dtype)
    writer = _Writer(directory, settings, dtype, files)
    for name, tensor in values:
        writer.write(name, tensor)
    writer.close()

    if len(files) - (HEADS_FILE in files) > 1:
        model_files = {name: file for file, names in files.items() if file != HEADS_FILE for name in names}
        total = sum(_bytes_of_shape(files[file][name], dtype) for name, file in model_files.items())
        write_file(directory / INDEX_FILE, _json({"metadata": {"total_size": total}, "weight_map": model_files}))
    if text is not None:
        config |= {"max_position_embeddings": text.context_length, **text.special_ids}
        write_file(directory / GENERATION_CONFIG_FILE, _json({"do_sample": False, **text.special_ids}))
    write_file(directory / CONFIG_FILE, _json(config))


def weight_layout(settings: ModelSettings, dtype: torch.dtype) -> dict[str, dict[str, list[int]]]:
    """Return {file: {tensor's name in the file: shape}}, in the order of the files."""
    with torch.device("meta"):
        model = MTPModel(settings)
    groups: list[dict[str, list[int]]] = [{}]
    heads: dict[str, list[int]] = {}
    num_bytes = 0
    for name, parameter in model.named_parameters():
        exported, shape = export_name(name, settings), list(parameter.shape)
        if exported.startswith("prediction_heads."):
            heads[exported] = shape
            continue
        if num_bytes >= SHARD_BYTES:
            groups.append({})
            num_bytes = 0
        groups[-1][exported] = shape
        num_bytes += _bytes_of_shape(shape, dtype)

    # One file has the plain name.
    total = len(groups)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    files = {WEIGHTS_FILE: groups[0]} if total == 1 else dict(zip(names, groups, strict=True))
    return files | ({HEADS_FILE: heads} if heads else {})


class _Writer:
    """Writes tensors to their places in safetensors files, which have their whole size from the beginning."""

    def __init__(self, directory: Path, settings: ModelSettings, dtype: torch.dtype, files: dict[str, dict[str, list[int]]]):
        self.settings = settings
        self.dtype = dtype
        self._places: dict[str, tuple[Path, int]] = {}
        for file, shapes in files.items():
            path = directory / file
            with naming(path):
                for name, begin in _make_file(path, shapes, dtype):
                    self._places[name] = (path, begin)
        self._left = set(self._places)
        self._files = [directory / file for file in files]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a parameter, by its name in the model."""
        exported = export_name(name, self.settings)
        self._left.remove(exported)
        path, begin = self._places[exported]
        values = tensor.detach().to(device="cpu", dtype=self.dtype).contiguous().flatten()
        with naming(path), path.open("r+b") as file:
            file.seek(begin)
            file.write(values.view(torch.uint8).numpy().data)

    def close(self) -> None:
        assert not self._left, f"parameters without values: {sorted(self._left)[:3]}"
        for path in self._files:
            sync_file(path)


def _make_file(path: Path, shapes: dict[str, list[int]], dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Make a safetensors file of zeros; yields each tensor's name and the place of its first byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes_of_shape(shape, dtype)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        data_begin = file.tell()
        file.truncate(data_begin + end)
    yield from ((name, data_begin + header[name]["data_offsets"][0]) for name in shapes)


def _gathered(model: MTPModel, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        with gather(parameter):
            yield name, parameter.detach()


def _bytes_of_shape(shape: list[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
