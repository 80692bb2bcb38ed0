"""The weight files of a model folder: `model.safetensors`, or the files that its index names, and `mtp_heads.safetensors`.

The last holds prediction heads 1, 2, …, and lies beside an ordinary causal language model, whose readers do not open it.

Only safetensors are read, because loading a pickled checkpoint executes code. A folder in which two things claim to be the
weights, such as a single file beside the index of another save, is refused: readers differ in which of them they take.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.model.meta import PARAMS_FILE
from pipeline.model.model_config import CONFIG_FILE, ModelFilesError, read_json
from pipeline.storage.lfs_pointer import pointer_problem

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HEADS_FILE = "mtp_heads.safetensors"
META_WEIGHTS_FILE = "consolidated.safetensors"

_CHANGES_THE_WEIGHTS = {
    "adapter_config.json": "an adapter on top of these weights; merge it into them",
    "hf_quant_config.json": "quantised weights; use the weights before they were quantised",
    "quantize_config.json": "quantised weights; use the weights before they were quantised",
    "quant_config.json": "quantised weights; use the weights before they were quantised",
}
"""Files beside the weights that change what they mean."""


class Weights(Protocol):
    """The weights of a model that lies in files: each parameter by its name in `MTPModel`, read when it is asked for."""

    def tensor(self, name: str) -> Tensor: ...


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files of a model folder, that of the prediction heads last.

    Raises:
        ModelFilesError: config.json or a weight file is missing, is no safetensors file, or is contradicted by another.
    """
    if not directory.is_dir():
        raise ModelFilesError(f"{directory}: no such directory; expected a model ({CONFIG_FILE}, {WEIGHTS_FILE})")
    for name, meaning in _CHANGES_THE_WEIGHTS.items():
        if (directory / name).exists():
            raise ModelFilesError(f"{directory}: {name} says that the folder holds {meaning}")

    if is_of_meta(directory):
        return _meta_files(directory)
    files_of_tensors = _read_index(directory)
    files = [directory / WEIGHTS_FILE] if files_of_tensors is None else [directory / name for name in files_of_tensors]
    missing = [file.name for file in [directory / CONFIG_FILE, *files] if not file.is_file()]
    if missing:
        pickles = sorted(each.name for each in directory.glob("*.bin"))
        has = f"; {pickles[0]} is a pickle, which is never executed: save the model as safetensors" if pickles else ""
        raise ModelFilesError(f"{directory}: missing {', '.join(missing)}; expected {CONFIG_FILE} and {WEIGHTS_FILE}{has}")

    # Opening a file reads its header, which is enough to tell what is in it.
    for file in files:
        found = _tensor_names(file)
        indexed = found if files_of_tensors is None else files_of_tensors[file.name]
        if found != indexed:
            name = min(found ^ indexed)
            state = "has" if name in found else "lacks"
            raise ModelFilesError(
                f"{directory}: {file.name} {state} '{name}', other than {INDEX_FILE} says; copy the folder again"
            )
    heads = directory / HEADS_FILE
    return [*files, heads] if heads.is_file() and _tensor_names(heads) else files


def is_of_meta(directory: Path) -> bool:
    """True if a folder has Meta's layout, which `model.meta` describes."""
    return (directory / PARAMS_FILE).is_file() and not (directory / CONFIG_FILE).exists()


def _meta_files(directory: Path) -> list[Path]:
    file = directory / META_WEIGHTS_FILE
    if not file.is_file():
        pickles = sorted(each.name for each in directory.glob("*.pth"))
        has = f"; {', '.join(pickles)} is a pickle, which is never executed: convert it as the README says" if pickles else ""
        raise ModelFilesError(f"{directory}: {PARAMS_FILE} without {META_WEIGHTS_FILE}{has}")
    _tensor_names(file)
    return [file]


@contextmanager
def opened_tensors(directory: Path) -> Iterator[dict[str, Any]]:
    """Open the weight files; yields the file that holds each tensor, by the tensor's name.

    Raises:
        ModelFilesError: as `weight_files`.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in weight_files(directory):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            tensors |= dict.fromkeys(opened.keys(), opened)
        yield tensors


def _read_index(directory: Path) -> dict[str, set[str]] | None:
    """The names of the tensors in each file by the file's name, as the index has them, sorted; None without an index."""
    index = directory / INDEX_FILE
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{index}: expected 'weight_map', an object with the file of each tensor, got {weight_map!r}")

    # A file's name alone: an index never leads out of its folder.
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelFilesError(
                f"{index}: '{tensor}' lies in {file!r}; expected the name of a .safetensors file in the same folder"
            )
        files.setdefault(file, set()).add(tensor)
    if WEIGHTS_FILE not in files and (directory / WEIGHTS_FILE).exists():
        raise ModelFilesError(
            f"{directory}: holds {WEIGHTS_FILE} and {INDEX_FILE}, which names other files; remove the one that is out of date"
        )
    return dict(sorted(files.items()))


def _tensor_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except SafetensorError as error:
        raise ModelFilesError(pointer_problem(file) or f"{file}: not a safetensors file: {error}") from None
    except OSError as error:
        raise ModelFilesError(f"{file}: cannot be read: {error}") from None
