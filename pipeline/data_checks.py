"""Check the data sets, and the reference losses cached for them, against the settings and each other.

A problem is a sentence: the key, the value found, the value expected, the remedy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import Settings
from pipeline.data.errors import DataError
from pipeline.data.loading.held_out import too_many_rows
from pipeline.data.loading.mixture import held_out_sets, sets_of
from pipeline.data.loading.order import too_few_samples
from pipeline.data.shards.manifest import Manifest, read_manifest, tokenizer_difference
from pipeline.data.shards.reference_losses import CachedLosses, check_alike
from pipeline.derived import cache_of, cached_losses, has_selecting_heads, lanes_of
from pipeline.model_checks import model_problems
from pipeline.storage.location import Location


def data_locations(settings: Settings) -> list[Location]:
    """Locations of all data sets, those of training first, each once."""
    sets = [*sets_of(settings.data), *held_out_sets(settings.data)]
    return list(dict.fromkeys(each.location for each in sets))


def data_problems(settings: Settings) -> list[str]:
    manifests, problems = read_manifests(settings)
    first = next(iter(manifests.values()), None)
    for path, manifest in manifests.items():
        problems += _manifest_problems(manifest, path, settings, first)
    # Older manifests do not tell how documents begin, nor the tokenizer's identity: compare models with one that tells most.
    telling = max(
        manifests.values(), key=lambda each: (each.bos is not None) + (each.tokenizer_identity is not None), default=None
    )
    return [*problems, *_num_rows_problems(manifests, settings), *model_problems(settings, telling)]


def read_manifests(settings: Settings) -> tuple[dict[Location, Manifest], list[str]]:
    """The manifests of the data that is named, the training data's first, and what is wrong with those not read."""
    manifests, problems = {}, []
    named = {f"data.mixture {each.name}": each.path for each in settings.data.mixture or ()} | {
        "data.path": settings.data.path,
        **{f"data.validation_path {name}".strip(): path for name, path in settings.data.validation_sets.items()},
        "reference.training_data": settings.reference.training_data,
    }
    for key, path in named.items():
        try:
            if path is not None:
                manifests[path] = read_manifest(path, settings.data.access)
        except DataError as error:
            problems.append(f"{key}: {error}")
    return manifests, problems


def _manifest_problems(found: Manifest, path: Location, settings: Settings, first: Manifest | None) -> Iterator[str]:
    if found.sequence_length != settings.data.sequence_length:
        yield (
            f"data.sequence_length: {settings.data.sequence_length}, but {path} holds rows of {found.sequence_length} "
            "tokens; set the one or prepare the other"
        )
    if first is not None and (difference := tokenizer_difference(first, found)) is not None:
        finer = f" ({difference})" if first.tokenizer_sha256 == found.tokenizer_sha256 else ""
        yield (f"{path}: prepared with another tokenizer than the other data of this run{finer}; prepare both with the same")


def _num_rows_problems(manifests: Mapping[Location, Manifest], settings: Settings) -> Iterator[str]:
    """Problems of the folders' numbers of rows, of those that could be read."""
    data, lanes = settings.data, lanes_of(settings)
    trained_on = [*(each.path for each in data.mixture or ()), data.path, settings.reference.training_data]
    for path, manifest in manifests.items():
        if path in trained_on and manifest.num_samples < lanes:
            yield f"{path}: {too_few_samples(manifest.num_samples, lanes)}"

    for held_out in held_out_sets(data):
        if held_out.location in manifests:
            problem = too_many_rows(settings.logging.validation_samples, manifests[held_out.location], held_out)
            yield from [] if problem is None else [f"logging.validation_samples: {problem}, or null for all"]


def cache_problems(settings: Settings, config: dict[str, Any]) -> Iterator[str]:
    """Problems of the cached losses; the built-in corpus has none, because the job is yet to prepare it."""
    if settings.data.builtin or not has_selecting_heads(settings):
        return
    key, _ = cache_of(settings)
    found: list[CachedLosses] = []
    for location in data_locations(settings):
        try:
            # The reference itself is read later, when the ranks can share the work.
            found += filter(None, [cached_losses(settings, location, config, reference_sha256=None)])
        except DataError as error:
            yield f"{key}: {error}"
    try:
        check_alike(found)
    except DataError as error:
        yield f"{key}: {error}"


def missing_cache(settings: Settings) -> Iterator[str]:
    """Problems of the cache's folder by itself, where nothing can be compared with it."""
    key, cached = cache_of(settings)
    if cached is not None and not cached.is_dir():
        yield f"{key}: {cached}: no such folder; make it with launch/score.py"
