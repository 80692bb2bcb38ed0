"""Check data, sizes, reference and pretrained weights against the settings, before any compute is spent.

Each check yields sentences: the key, the value found, the value expected, the remedy. `check_before_start` raises them,
together with the problems of the settings and of the DeepSpeed JSON, as one error.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Settings
from pipeline.data.corpus.builtin import VOCAB_SIZE
from pipeline.data.loading.sizes import check_sizes
from pipeline.data_checks import cache_problems, data_problems, missing_cache, read_manifests
from pipeline.derived import lanes_of, vocab_size_of
from pipeline.model.huggingface import ModelFilesError, read_model_settings, weight_problems
from pipeline.model_checks import reference_problems
from pipeline.runtime.deepspeed_json import read_deepspeed_json, resolve_deepspeed_json
from pipeline.runtime.distributed import World


def check_before_start(
    settings: Settings,
    deepspeed_json: Path | None,
    run_dir: Path,
    world: World,
    problems: Sequence[str] = (),
    own: Sequence[str] = (),
) -> dict[str, Any]:
    """Make every check that needs no process group; returns the JSON's content.

    deepspeed_json: None if the option is missing or was refused, which is then one of the problems.
    problems: those already found in options and settings. A refused setting holds its default, so checks that might compare it
        are left out: data and models are then looked at by themselves, and sizes where no problem is about one.
    own: those that the command found by checks of its own; what is said of a setting that was refused is left out.

    Raises:
        ConfigError: all problems of settings, DeepSpeed JSON, sizes, data and reference at once.
    """
    content, found = _read_json(deepspeed_json, settings)
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "tensorboard"):
        found += [problem for problem in folder_problems("--run-dir", folder) if problem not in found]
    if settings.logging.wandb is not None and find_spec("wandb") is None:
        found.append("logging.wandb: the library is not installed; pip install -e '.[wandb]', or unset it")
    if _are_meant(_SIZES, problems):
        found += size_problems(settings, world.size)
    if _are_meant(_COMPARED, problems):
        found += data_problems(settings)
    else:
        found += [*read_manifests(settings)[1], *_problems_of_folders(settings)]
    found = [*problems, *(each for each in own if _are_meant([each.partition(":")[0]], problems)), *found]
    if not found:
        # A cache is looked up by its precision; no number of rows matters here.
        one_row = settings.with_values(data={"micro_batch": 1})
        found += cache_problems(settings, resolve_deepspeed_json(content, one_row, world.size))
    elif _are_meant(_COMPARED, problems):
        found += missing_cache(settings)
    if found:
        raise ConfigError(found)
    return content


def check_before_planning(
    settings: Settings, deepspeed_json: Path | None, num_ranks: int | None, problems: Sequence[str] = ()
) -> tuple[Settings, dict[str, Any]]:
    """Make the checks that need neither data nor reference, for `launch/plan.py`. None stands for an option that is missing or
    was refused, which is then one of the problems.

    Returns:
        The settings with vocab_size filled in, and the JSON's content.

    Raises:
        ConfigError: all problems of settings, DeepSpeed JSON and sizes at once, among them an unknown vocabulary.
    """
    content, found = _read_json(deepspeed_json, settings)
    if num_ranks is not None and _are_meant(_SIZES, problems):
        found += size_problems(settings, num_ranks)

    vocab_size = settings.model.vocab_size
    if _are_meant(_COMPARED, problems):
        try:
            vocab_size, unreadable = vocabulary_of(settings)
        except ModelFilesError as error:
            raise ConfigError([*problems, *found, f"model.pretrained: {error}"]) from None
        if vocab_size is None:
            found.append(f"model.vocab_size: not set, and the data does not tell ({'; '.join(unreadable)}); set it")
    if problems or found:
        raise ConfigError([*problems, *found])
    return settings.with_values(model={"vocab_size": vocab_size}), content


def check_data(settings: Settings) -> None:
    """Check the data again, once the job has prepared what it prepares itself.

    Raises:
        ConfigError: data sets, sizes and model do not fit each other.
    """
    problems = data_problems(settings)
    if problems:
        raise ConfigError(problems)


def vocabulary_of(settings: Settings) -> tuple[int | None, list[str]]:
    """The vocabulary's size: as set, the pretrained model's, the built-in corpus's, or the data's; else None, and why.

    Raises:
        ModelFilesError: the pretrained model cannot be read.
    """
    known = vocab_size_of(settings, VOCAB_SIZE if settings.data.builtin else 0)
    if known:
        return known, []
    manifests, unreadable = read_manifests(settings)
    return next((manifest.vocab_size for manifest in manifests.values()), None), unreadable


def size_problems(settings: Settings, num_ranks: int) -> list[str]:
    """List the reasons why a step's rows cannot be divided among so many ranks."""
    return check_sizes(
        lanes=lanes_of(settings),
        global_batch=settings.data.global_batch,
        micro_batch=None if settings.data.micro_batch == "auto" else settings.data.micro_batch,
        world_size=num_ranks,
        num_workers=settings.data.num_workers,
    )


def _read_json(path: Path | None, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    return ({}, []) if path is None else read_deepspeed_json(path, settings)


# Settings that are compared with each other and the number of ranks, and those that are with data and models.
_SIZES = ("data.global_batch", "data.micro_batch", "data.lanes", "data.num_workers")
_COMPARED = ("data.", "model.", "reference.", "logging.validation_samples")


def _are_meant(settings: Sequence[str], problems: Sequence[str]) -> bool:
    """True if no problem can have put a default in the place of one of these settings: one that names it, or a text that could
    not be read."""
    unread = ("--config: ", "data: ", "model: ", "reference: ", "'")
    return not any(problem.startswith(unread) or any(name in problem for name in settings) for problem in problems)


def folder_problems(option: str, folder: Path) -> Iterator[str]:
    """Problems of a folder that is to be made or written to, as an option names it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"{option}: {existing} is a file; expected a directory, or none yet"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"{option}: {existing} cannot be written to; choose another one"


def _problems_of_folders(settings: Settings) -> Iterator[str]:
    """Problems of the folders of models and of the cache by themselves, compared with no setting."""
    yield from reference_problems(settings, None, compared=False)
    yield from missing_cache(settings)
    if settings.model.pretrained is not None:
        try:
            found = read_model_settings(settings.model.pretrained)
        except ModelFilesError as error:
            yield f"model.pretrained: {error}"
            return
        yield from (f"model.pretrained: {problem}" for problem in weight_problems(found, settings.model.pretrained))
