"""Find the model that a path means (a run directory, a checkpoint folder or a model folder), and read it without an engine.

Of a run directory it is the newest checkpoint whose every byte is sound, or that of a step. A model folder has config.json and
safetensors: what `launch/export.py` wrote, or a reference that a run has trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.config import ModelSettings
from pipeline.data.special_tokens import SpecialTokens, special_tokens
from pipeline.data.tokenizer import TOKENIZER_FILE, find_tokenizer, identity, load_tokenizer, vocab_size
from pipeline.model.drafter import drafter_verifier
from pipeline.model.huggingface import FolderWeights, copy_weights
from pipeline.model.layout import layout_of, read_longest_row
from pipeline.model.model_config import CONFIG_FILE, ModelFilesError
from pipeline.model.mtp import MTPModel
from pipeline.model.weight_files import Weights
from pipeline.runtime.checkpoint.folders import read_state_of, saved_steps, step_name
from pipeline.runtime.checkpoint.state import STATE_FILE, State
from pipeline.runtime.checkpoint.weights import CheckpointError, CheckpointWeights

_CHECKPOINTS, _SECTION = "checkpoints", "model."
_EXPECTED = f"expected a run directory, a checkpoint folder (step-…, with {STATE_FILE}) or a model folder (with {CONFIG_FILE})"


@dataclass(frozen=True)
class SavedModel:
    """A model in files, of which nothing but its shape has been read.

    directory: the checkpoint folder, or the model folder.
    weights: its parameters, by their names in `MTPModel`.
    dtype: that the model was trained in, or that of its files.
    context_length: T, tokens of a row in training; None if a model folder does not say.
    run_dir, state: of a checkpoint; None for a model folder, and a run_dir for a checkpoint that lies in none.
    notes: what was wrong with newer checkpoints, a sentence each.
    """

    directory: Path
    settings: ModelSettings
    weights: Weights
    dtype: torch.dtype
    context_length: int | None
    run_dir: Path | None = None
    state: State | None = None
    notes: list[str] = field(default_factory=list)

    def build(self, device: torch.device, dtype: torch.dtype) -> MTPModel:
        """Build the model for inference, with its weights.

        Raises:
            ModelFilesError: a weight is not finite in this dtype.
        """
        with torch.device("meta"):
            model = MTPModel(self.settings)
        model = model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
        if self.settings.tied_embeddings:
            model.unembed.weight = model.embed.weight  # `to_empty` has parted them.
        try:
            copy_weights(model, self.weights)
        except ModelFilesError as error:
            raise ModelFilesError(f"{self.directory}: {error}") from None
        return model

    def tokenizer(self, given: Path | None = None) -> tuple[Path, SpecialTokens]:
        """Find the file of the model's tokenizer, and the tokens around its documents.

        given: a tokenizer.json, or its folder, to take in place of the model's own.

        Raises:
            DataError: there is none, or it contradicts what lies beside it. ModelFilesError: none is known, or it is another
                model's.
        """
        folder = given if given is not None else self._tokenizer_folder()
        file = find_tokenizer(folder)
        tokenizer = load_tokenizer(file)
        found = special_tokens(tokenizer, file.parent)
        needed, known = vocab_size(tokenizer), self.settings.vocab_size
        if known is not None and needed > known:
            raise ModelFilesError(
                f"{file}: has ids up to {needed - 1}, and {self.directory} knows {known} ids; it is another model's tokenizer"
            )
        own = None if given is None else self._tokenizer_folder_if_any()
        if own is not None and identity(load_tokenizer(own)) != identity(tokenizer):
            raise ModelFilesError(f"{file}: is another tokenizer than the model's own, {own}; leave --tokenizer out")
        return file, found

    def _tokenizer_folder(self) -> Path:
        """The folder with the model's own tokenizer."""
        found = self._tokenizer_folder_if_any()
        if found is None:
            places = " or ".join(map(str, self._tokenizer_places()))
            raise ModelFilesError(f"{self.directory}: no {TOKENIZER_FILE} in {places}; name it with --tokenizer")
        return found

    def _tokenizer_folder_if_any(self) -> Path | None:
        return next((folder for folder in self._tokenizer_places() if (folder / TOKENIZER_FILE).is_file()), None)

    def _tokenizer_places(self) -> list[Path]:
        """The run directory or the model folder, then the run's data."""
        known = {} if self.state is None else self.state.identity
        data = known.get("data.path") or next((each["path"] for each in known.get("data.mixture") or []), None)
        return [self.run_dir or self.directory, *([Path(data)] if isinstance(data, str) else [])]


def find_model(path: Path, step: int | None = None) -> SavedModel:
    """Find the model that `path` means; every byte of a checkpoint is verified.

    step: of a run directory's checkpoint; None for the newest sound one.

    Raises:
        ModelFilesError: there is no such model, or it is not sound. CheckpointError: a checkpoint's bytes are not those that
            were written.
    """
    if not path.is_dir():
        raise ModelFilesError(f"{path}: {'is a file' if path.exists() else 'no such folder'}; {_EXPECTED}")
    if (path / STATE_FILE).is_file():
        return _of_checkpoint(path, step)
    if (path / _CHECKPOINTS).is_dir():
        return _of_run(path, step)
    if (path / layout_of(path).description).is_file():
        return _of_model_folder(path, step)
    if path.name == _CHECKPOINTS and saved_steps(path):
        return _of_run(path.absolute().parent, step)
    if (path / "config.yaml").is_file():
        raise ModelFilesError(f"{path}: a run directory that has no checkpoint yet")
    raise ModelFilesError(f"{path}: holds no model; {_EXPECTED}")


def _of_run(run_dir: Path, step: int | None) -> SavedModel:
    """The newest sound checkpoint, or that of a step."""
    directory = run_dir / _CHECKPOINTS
    steps = saved_steps(directory)
    if not steps:
        raise ModelFilesError(f"{run_dir}: a run directory that has no checkpoint yet")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps[::-1]))
        raise ModelFilesError(f"--step {step}: {run_dir} has no checkpoint of that step; there are: {there}")

    problems: list[str] = []
    for each in steps if step is None else [step]:
        folder = directory / step_name(each)
        try:
            return _checkpoint(folder, run_dir, problems)
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(f"{run_dir}: no checkpoint can be used: {'; '.join(problems)}")


def _of_checkpoint(folder: Path, step: int | None) -> SavedModel:
    absolute = folder.resolve()
    run_dir = absolute.parent.parent if absolute.parent.name == _CHECKPOINTS else None
    model = _checkpoint(folder, run_dir, [])
    assert model.state is not None
    if step not in (None, model.state.step):
        raise ModelFilesError(f"--step {step}: {folder} is the checkpoint of step {model.state.step}; name the run directory")
    return model


def _checkpoint(folder: Path, run_dir: Path | None, notes: list[str]) -> SavedModel:
    state, problem = read_state_of(folder)
    if state is None:
        raise CheckpointError(problem)
    settings = _shape_in(state.identity, folder)
    weights = CheckpointWeights(folder, state)
    differences = list(_differences(settings, state))
    if differences:
        raise ModelFilesError(f"{folder}: its tensors are not those of the model that {STATE_FILE} describes: {differences[0]}")
    dtype = torch.bfloat16 if state.identity.get("deepspeed bf16") else torch.float32
    length = state.identity.get("data.sequence_length")
    return SavedModel(
        folder, settings, weights, dtype, length, run_dir, state, [f"checkpoint not used: {note}" for note in notes]
    )


def _shape_in(identity: dict[str, Any], folder: Path) -> ModelSettings:
    """The model's shape as a checkpoint's identity has it."""
    values = {key.removeprefix(_SECTION): value for key, value in identity.items() if key.startswith(_SECTION)}
    if "vocab_size" not in values:
        raise ModelFilesError(f"{folder}: {STATE_FILE} does not say the shape of its model")
    try:
        return ModelSettings.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        raise ModelFilesError(f"{folder}: {STATE_FILE}: model.{key}: {detail['msg']}; was a newer program at work?") from None


def _differences(settings: ModelSettings, state: State) -> Iterator[str]:
    """Compare the tensors of a checkpoint with the parameters of a model."""
    with torch.device("meta"):
        model = MTPModel(settings)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: parameter.shape for name, parameter in state.parameters.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{name} is {found.get(name, 'not there')}, expected {expected.get(name, 'none')}"


def _of_model_folder(folder: Path, step: int | None) -> SavedModel:
    if step is not None:
        raise ModelFilesError(f"--step {step}: {folder} is a model folder, which has no steps; name the run directory")
    verifier = drafter_verifier(folder)
    if verifier is not None:
        raise ModelFilesError(f"{folder}: is a drafter for a serving engine; name the model that it drafts for, {verifier}")
    weights = FolderWeights(folder)
    dtype = torch.bfloat16 if weights.is_bfloat16 else torch.float32
    longest = read_longest_row(folder)
    return SavedModel(folder, weights.settings, weights, dtype, None if longest is None else longest.num_tokens)
