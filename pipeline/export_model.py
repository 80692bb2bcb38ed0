"""Export a model: write it under another name, verify it, rename it. A folder is then a whole and right model, or not there.

It is verified by what its readers see. Every tensor of the written files is compared, bit for bit, with the one that it came
of, cast to the dtype. Then losses of four rows, computed from the written files as their config.json describes them, are
compared with those of the model that was exported. A drafter for a serving engine is written around the model, and verified
in the same way.

It is written as `DIR.partial` beside DIR, under a lock: a second export into one DIR is refused, not mixed with the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.data.errors import DataError
from pipeline.data.loading.batch import collate
from pipeline.data.shards.manifest import MANIFEST_FILE, read_manifest
from pipeline.data.shards.output_folder import LOCK_FILE, clear, locked, make_partial, partial_folder, remove
from pipeline.data.shards.reader import ShardReader
from pipeline.data.tokenizer_files import tokenizer_files
from pipeline.model.block_losses import block_losses
from pipeline.model.drafter import VERIFIER, drafter_problem, drafter_tensors, write_drafter
from pipeline.model.export import TextConventions, write_model
from pipeline.model.huggingface import FolderWeights, check_finite
from pipeline.model.mtp import MTPModel
from pipeline.model.weight_files import WEIGHTS_FILE
from pipeline.model_card import CARD_FILE, drafter_card, model_card
from pipeline.saved_model import SavedModel
from pipeline.storage.whole_file import free_on_disk, publish, sync_file, write_file

TOLERANCE = 1e-5
"""Relative, of a loss in float32: what another order of summation makes, and another model does not."""
_NUM_ROWS, _MOST_TOKENS = 4, 512
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class ExportError(ValueError):
    """A model cannot be exported there, or what was written is not the model. Nothing is left of it."""


@dataclass(frozen=True)
class Verified:
    """Result of the comparison. largest_difference: of a loss of the rows, relative. rows: where they came from."""

    num_tensors: int
    num_bytes: int
    largest_difference: float
    rows: str


def export_model(
    model: SavedModel, directory: Path, dtype: torch.dtype, tokenizer: Path | None = None, engine: str | None = None
) -> Verified:
    """Write a model to `directory`, which must be empty or not exist.

    engine: write head 1 there as a drafter for this serving engine, and the model to a folder in it.

    Raises:
        ExportError: the folder is not empty or has no room, the model has no drafter, or what was written is not the model.
        DataError, ModelFilesError: there is no tokenizer of the model, or another process exports to this folder.
    """
    check_place(directory)
    directory = directory.resolve()  # `.` has no name to write beside
    problem = None if engine is None else drafter_problem(model.settings, engine)
    if problem is not None:
        raise ExportError(f"--drafter: {problem}")
    _check_room(model, directory, dtype, engine)
    files, text = _text_of(model, tokenizer)

    partial = partial_folder(directory)
    make_partial(partial)
    with locked(partial):
        try:
            check_place(directory)  # again: the previous holder of the lock may have finished
            clear(partial)
            verified = _write_all(model, partial, directory.name, dtype, engine, files, text)
            publish(partial, directory)
        except BaseException:
            remove(partial)
            raise
        (directory / LOCK_FILE).unlink()
    return verified


def _write_all(
    model: SavedModel,
    partial: Path,
    name: str,
    dtype: torch.dtype,
    engine: str | None,
    files: dict[str, bytes],
    text: TextConventions,
) -> Verified:
    """Write the model into an empty folder that will be called `name`, or a drafter and the model in it; verify them."""
    if engine is None:
        return _write(model, partial, name, dtype, files, text)

    (partial / VERIFIER).mkdir()
    verified = _write(model, partial / VERIFIER, f"{name}/{VERIFIER}", dtype, files, text)
    sync_file(partial / VERIFIER)
    write_drafter(partial, model.settings, model.weights, dtype, text, engine)
    verified = _verify_drafter(model, partial, dtype, engine, verified)
    write_file(partial / CARD_FILE, drafter_card(name, engine).encode())
    return verified


def _write(
    model: SavedModel, folder: Path, name: str, dtype: torch.dtype, files: dict[str, bytes], text: TextConventions
) -> Verified:
    """Write the model into a folder, which its card calls `name`, and verify it."""
    write_model(folder, model.settings, dtype, _values(model, dtype), text)
    for file, content in files.items():
        write_file(folder / file, content)
    verified = _verify(model, folder, dtype)
    write_file(folder / CARD_FILE, model_card(model, name, dtype, text, verified.largest_difference).encode())
    return verified


def check_place(directory: Path) -> None:
    """Raise ExportError if a model cannot be exported to this folder."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ExportError(
            f"{directory}: is a {'link' if directory.is_symlink() else 'file'}; name a folder that does not exist"
        )
    if directory.is_dir() and any(directory.iterdir()):
        raise ExportError(f"{directory}: is not empty; name a folder that does not exist, or an empty one")


def _check_room(model: SavedModel, directory: Path, dtype: torch.dtype, engine: str | None) -> None:
    parameters = dict(_parameters(model))
    numbers = sum(each.numel() for each in parameters.values())
    if engine is not None:
        with torch.device("meta"):
            numbers += sum(tensor.numel() for _, tensor in drafter_tensors(model.settings, _Shapes(parameters), engine))

    needed, free = numbers * dtype.itemsize, free_on_disk(directory)
    if free < needed:
        raise ExportError(f"{directory}: {needed:,} bytes are needed, and {free:,} are free; write elsewhere, or free some")


class _Shapes:
    """Weights that hold nothing and have a shape."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the meta device."""
        return self._parameters[name]


def _text_of(model: SavedModel, tokenizer: Path | None) -> tuple[dict[str, bytes], TextConventions]:
    """The tokenizer files beside the model, and what config.json says of text."""
    file, special = model.tokenizer(tokenizer)
    length = model.context_length
    if length is None:
        raise ExportError(f"{model.directory}: config.json does not say max_position_embeddings; add it")
    files, pad_id = tokenizer_files(file.read_bytes(), special.end_of_document_id, True, special.bos_id, length)
    return files, TextConventions(length, special.end_of_document_id, special.bos_id, pad_id)


def _values(model: SavedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and values in the dtype, one in memory at a time."""
    for name, _ in _parameters(model):
        tensor = model.weights.tensor(name).to(dtype)
        check_finite(f"{model.directory}: {name}", tensor)
        yield name, tensor


def _parameters(model: SavedModel) -> list[tuple[str, nn.Parameter]]:
    """List each parameter's name, with a tensor of its shape that holds nothing."""
    with torch.device("meta"):
        return list(MTPModel(model.settings).named_parameters())


def _verify(model: SavedModel, directory: Path, dtype: torch.dtype) -> Verified:
    """Compare what was written with the model, as its readers find it."""
    written = FolderWeights(directory)
    expected = _values(model, dtype)
    num_tensors, num_bytes = _compare(((name, tensor, written.tensor(name)) for name, tensor in expected), directory, dtype)

    tokens_BT, rows = _some_rows(model)
    before = block_losses(model.settings, model.weights, tokens_BT)
    after = block_losses(written.settings, written, tokens_BT)
    difference = ((after - before).abs() / before.abs().clamp(min=1e-6)).max().item()
    if not difference <= TOLERANCE and dtype == torch.float32:
        raise ExportError(
            f"{directory}: losses of four rows differ by {difference:.2g} from those of {model.directory}, expected at most "
            f"{TOLERANCE:g}: config.json does not describe the model that was trained"
        )
    return Verified(num_tensors, num_bytes, difference, rows)


def _verify_drafter(model: SavedModel, directory: Path, dtype: torch.dtype, engine: str, verified: Verified) -> Verified:
    """Compare the drafter's tensors; returns what was compared of it and of the model together."""
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as opened:
        expected = drafter_tensors(model.settings, model.weights, engine)
        pairs = ((name, tensor, opened.get_tensor(name)) for name, tensor in expected)
        num_tensors, num_bytes = _compare(pairs, directory, dtype)
    return replace(verified, num_tensors=verified.num_tensors + num_tensors, num_bytes=verified.num_bytes + num_bytes)


def _compare(pairs: Iterable[tuple[str, Tensor, Tensor]], directory: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Compare each tensor, cast to the dtype, with the one that was written; returns their number and bytes."""
    num_tensors = num_bytes = 0
    for name, tensor, found in pairs:
        expected = tensor.to(dtype)
        if found.dtype != dtype or not torch.equal(found.view(_INTEGERS[dtype]), expected.view(_INTEGERS[dtype])):
            raise ExportError(f"{directory}: {name} was not written as it is; is the disk sound?")
        num_tensors, num_bytes = num_tensors + 1, num_bytes + found.nbytes
    return num_tensors, num_bytes


def _some_rows(model: SavedModel) -> tuple[Tensor, str]:
    """Four rows of the run's data, if it is on this machine, else of random tokens; int64 [4, at most 512]."""
    assert model.settings.vocab_size is not None
    data = model.state.identity.get("data.path") if model.state is not None else None
    if isinstance(data, str) and (Path(data) / MANIFEST_FILE).is_file():
        try:
            return _first_rows(Path(data))[:, :_MOST_TOKENS], f"rows of {data}"
        except DataError:
            pass  # The data is not what is exported: random rows compare two copies of a model as well.
    shape = (_NUM_ROWS, min(model.context_length or _MOST_TOKENS, _MOST_TOKENS))
    return torch.randint(model.settings.vocab_size, shape, generator=torch.Generator().manual_seed(0)), "random rows"


def _first_rows(folder: Path) -> Tensor:
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest)
    try:
        samples = range(min(_NUM_ROWS, manifest.shards[0].samples))
        return collate(reader.read_many([0] * len(samples), samples)).tokens_BT
    finally:
        reader.close()
