"""Check data, sizes, reference and pretrained weights against the settings, before any compute is spent.

Each check yields sentences: the key, the value found, the value expected, the remedy. `check_before_start` raises them,
together with the problems of the settings and of the DeepSpeed JSON, as one error.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Settings
from pipeline.data.corpus.builtin import VOCAB_SIZE
from pipeline.data.loading.sizes import check_sizes
from pipeline.data_checks import cache_problems, data_problems, missing_cache, read_manifests
from pipeline.derived import lanes_of
from pipeline.model.huggingface import ModelFilesError, read_model_settings, weight_problems
from pipeline.model_checks import reference_problems
from pipeline.runtime.deepspeed_json import read_deepspeed_json, resolve_deepspeed_json
from pipeline.runtime.distributed import World


def check_before_start(
    settings: Settings, deepspeed_json: Path, run_dir: Path, world: World, problems: Sequence[str] = ()
) -> dict[str, Any]:
    """Make every check that needs no process group; returns the JSON's content.

    problems: those already found in the settings. If there are any, the refused settings hold defaults, so checks that would
    compare them are left out: files are looked at, and sizes where no problem is about one.

    Raises:
        ConfigError: all problems of settings, DeepSpeed JSON, sizes, data and reference at once.
    """
    content, found = read_deepspeed_json(deepspeed_json, settings)
    found += _run_dir_problems(run_dir)
    if problems:
        _, unreadable = read_manifests(settings)
        found += size_problems(settings, world.size) if _sizes_are_meant(problems) else []
        raise ConfigError([*problems, *found, *unreadable, *_folder_problems(settings)])
    found += size_problems(settings, world.size)
    found += data_problems(settings)
    if found:
        found += missing_cache(settings)
    else:
        found += cache_problems(settings, resolve_deepspeed_json(content, settings, world.size))
    if found:
        raise ConfigError(found)
    return content


def check_before_planning(
    settings: Settings, deepspeed_json: Path, num_ranks: int, problems: Sequence[str] = ()
) -> tuple[Settings, dict[str, Any]]:
    """Make the checks that need neither data nor reference, for `launch/plan.py`.

    Returns:
        The settings with vocab_size filled in, and the JSON's content.

    Raises:
        ConfigError: all problems of settings, DeepSpeed JSON and sizes at once, among them an unknown vocabulary.
    """
    content, found = read_deepspeed_json(deepspeed_json, settings)
    if _sizes_are_meant(problems):
        found += size_problems(settings, num_ranks)

    # The vocabulary: set, the built-in corpus's, or the data's if it is here.
    vocab_size = settings.model.vocab_size or (VOCAB_SIZE if settings.data.builtin else None)
    if vocab_size is None and not problems:
        manifests, unreadable = read_manifests(settings)
        vocab_size = next((manifest.vocab_size for manifest in manifests.values()), None)
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


def size_problems(settings: Settings, num_ranks: int) -> list[str]:
    """List the reasons why a step's rows cannot be divided among so many ranks."""
    return check_sizes(
        lanes=lanes_of(settings),
        global_batch=settings.data.global_batch,
        micro_batch=settings.data.micro_batch,
        world_size=num_ranks,
        num_workers=settings.data.num_workers,
    )


def _sizes_are_meant(problems: Sequence[str]) -> bool:
    """True if no problem can have put a default in the place of a size: one that names it, or a text that could not be read."""
    sizes = ("data.global_batch", "data.micro_batch", "data.lanes", "data.num_workers")
    unread = ("--config: ", "data: ", "'")
    return not any(problem.startswith(unread) or any(size in problem for size in sizes) for problem in problems)


def _run_dir_problems(run_dir: Path) -> Iterator[str]:
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"--run-dir: {existing} is a file; expected a directory, or none yet"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"--run-dir: {existing} cannot be written to; choose another one"


def _folder_problems(settings: Settings) -> Iterator[str]:
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
