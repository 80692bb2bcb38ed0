"""Check data, sizes, reference and pretrained weights against the settings, before any compute is spent.

Each check yields sentences: the key, the value found, the value expected, the remedy. `check_before_start` raises them,
together with the problems of the settings and of the DeepSpeed JSON, as one error.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.config import ConfigError, ModelSettings, Settings
from pipeline.data.corpus.builtin import VOCAB_SIZE
from pipeline.data.errors import DataError
from pipeline.data.loading.held_out import too_many_rows
from pipeline.data.loading.mixture import held_out_sets, sets_of
from pipeline.data.loading.order import too_few_samples
from pipeline.data.loading.sizes import check_sizes
from pipeline.data.shards.manifest import Manifest, read_manifest, tokenizer_difference
from pipeline.data.shards.reference_losses import CachedLosses, check_alike
from pipeline.data.special_tokens import declared_bos_id
from pipeline.data.tokenizer import TOKENIZER_FILE, fingerprint, identity, load_tokenizer
from pipeline.derived import cached_losses, has_selecting_heads, lanes_of, next_token_model
from pipeline.model.huggingface import ModelFilesError, read_max_positions, read_model_settings, weight_problems
from pipeline.model.transformer import attention_head_dim, ffn_dim
from pipeline.runtime.deepspeed_json import read_deepspeed_json, resolve_deepspeed_json
from pipeline.runtime.distributed import World
from pipeline.storage.location import Location


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
        _, unreadable = _read_manifests(settings)
        found += size_problems(settings, world.size) if _sizes_are_meant(problems) else []
        raise ConfigError([*problems, *found, *unreadable, *_folder_problems(settings)])
    found += size_problems(settings, world.size)
    found += _data_problems(settings)
    if found:
        found += _missing_cache(settings)
    else:
        found += _cache_problems(settings, resolve_deepspeed_json(content, settings, world.size))
    if found:
        raise ConfigError(found)
    return content


def _sizes_are_meant(problems: Sequence[str]) -> bool:
    """True if no problem can have put a default in the place of a size: one that names it, or a text that could not be read."""
    sizes = ("data.global_batch", "data.micro_batch", "data.lanes", "data.num_workers")
    unread = ("--config: ", "data: ", "'")
    return not any(problem.startswith(unread) or any(size in problem for size in sizes) for problem in problems)


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
        manifests, unreadable = _read_manifests(settings)
        vocab_size = next((manifest.vocab_size for manifest in manifests.values()), None)
        if vocab_size is None:
            found.append(f"model.vocab_size: not set, and the data does not tell ({'; '.join(unreadable)}); set it")
    if problems or found:
        raise ConfigError([*problems, *found])
    return settings.with_values(model={"vocab_size": vocab_size}), content


def _cache_problems(settings: Settings, config: dict[str, Any]) -> Iterator[str]:
    """Problems of the cached losses; the built-in corpus has none, because the job is yet to prepare it."""
    if settings.data.builtin or not has_selecting_heads(settings):
        return
    found: list[CachedLosses] = []
    for location in data_locations(settings):
        try:
            # The reference itself is read later, when the ranks can share the work.
            found += filter(None, [cached_losses(settings, location, config, reference_sha256=None)])
        except DataError as error:
            yield f"reference.cached: {error}"
    try:
        check_alike(found)
    except DataError as error:
        yield f"reference.cached: {error}"


def _missing_cache(settings: Settings) -> Iterator[str]:
    """Problems of the cache's folder by itself, where nothing can be compared with it."""
    cached = settings.reference.cached
    if cached is not None and not cached.is_dir():
        yield f"reference.cached: {cached}: no such folder; make it with launch/score.py"


def _folder_problems(settings: Settings) -> Iterator[str]:
    """Problems of the folders of models and of the cache by themselves, compared with no setting."""
    yield from _reference_problems(settings, None, compared=False)
    yield from _missing_cache(settings)
    if settings.model.pretrained is not None:
        try:
            found = read_model_settings(settings.model.pretrained)
        except ModelFilesError as error:
            yield f"model.pretrained: {error}"
            return
        yield from (f"model.pretrained: {problem}" for problem in weight_problems(found, settings.model.pretrained))


def data_locations(settings: Settings) -> list[Location]:
    """Locations of all data sets, those of training first, each once."""
    sets = [*sets_of(settings.data), *held_out_sets(settings.data)]
    return list(dict.fromkeys(each.location for each in sets))


def check_data(settings: Settings) -> None:
    """Check the data again, once the job has prepared what it prepares itself.

    Raises:
        ConfigError: data sets, sizes and model do not fit each other.
    """
    problems = _data_problems(settings)
    if problems:
        raise ConfigError(problems)


def _data_problems(settings: Settings) -> list[str]:
    manifests, problems = _read_manifests(settings)
    first = next(iter(manifests.values()), None)
    for path, manifest in manifests.items():
        problems += _manifest_problems(manifest, path, settings, first)
    # Older manifests do not tell how documents begin, nor the tokenizer's identity: compare models with one that tells most.
    telling = max(
        manifests.values(), key=lambda each: (each.bos is not None) + (each.tokenizer_identity is not None), default=None
    )
    return [*problems, *_num_rows_problems(manifests, settings), *_model_problems(settings, telling)]


def size_problems(settings: Settings, num_ranks: int) -> list[str]:
    """List the reasons why a step's rows cannot be divided among so many ranks."""
    return check_sizes(
        lanes=lanes_of(settings),
        global_batch=settings.data.global_batch,
        micro_batch=settings.data.micro_batch,
        world_size=num_ranks,
        num_workers=settings.data.num_workers,
    )


def _read_manifests(settings: Settings) -> tuple[dict[Location, Manifest], list[str]]:
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


def _run_dir_problems(run_dir: Path) -> Iterator[str]:
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"--run-dir: {existing} is a file; expected a directory, or none yet"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"--run-dir: {existing} cannot be written to; choose another one"


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
            yield from [] if problem is None else [problem]


def _model_problems(settings: Settings, manifest: Manifest | None) -> list[str]:
    """Problems of model, reference and pretrained weights with the data. manifest: None if not known yet."""
    problems = []
    needed = manifest.vocab_size if manifest else 0
    if settings.model.vocab_size is not None and settings.model.vocab_size < needed:
        problems.append(
            f"model.vocab_size: {settings.model.vocab_size} is too small for the data's {needed} ids; leave it unset"
        )
    problems += _reference_problems(settings, manifest)

    # Pretrained weights must have the policy's shape.
    if settings.model.pretrained is not None:
        try:
            found = read_model_settings(settings.model.pretrained)
        except ModelFilesError as error:
            return [*problems, f"model.pretrained: {error}"]
        problems += [f"model.pretrained: {problem}" for problem in _length_problems(settings.model.pretrained, settings)]
        own = settings.model.model_copy(update={"vocab_size": settings.model.vocab_size or needed or found.vocab_size})
        differences = [
            f"model.{key}: {mine!r}, but {settings.model.pretrained} has {theirs!r}; they must be equal"
            for key, mine, theirs in _shape_differences(own, found)
        ]
        problems += differences or [
            f"model.pretrained: {problem}" for problem in weight_problems(own, settings.model.pretrained)
        ]
    return problems


def _reference_problems(settings: Settings, manifest: Manifest | None, compared: bool = True) -> Iterator[str]:
    """Problems of the reference. compared: false if settings must not be compared with it, as some hold defaults."""
    directory, num_heads = settings.reference.path, settings.model.num_prediction_heads
    if directory is None:
        return
    try:
        shape = read_model_settings(directory)
        tokenizer = load_tokenizer(directory / TOKENIZER_FILE)
    except (ModelFilesError, DataError) as error:
        yield f"reference.path: {error}"
        return

    # Its weights, heads and positions.
    needed = shape if settings.reference.horizon == "matched" else next_token_model(shape)
    yield from (f"reference.path: {problem}" for problem in weight_problems(needed, directory))
    if not compared:
        return
    yield from (f"reference.path: {problem}" for problem in _length_problems(directory, settings))
    if settings.reference.horizon == "matched" and shape.num_prediction_heads != num_heads:
        yield (
            f"reference.horizon: 'matched' needs a reference with the policy's {num_heads} heads, {directory} has "
            f"{shape.num_prediction_heads}; set reference.horizon=shifted"
        )

    # Its vocabulary: every id of the data, under the data's tokenizer.
    if manifest is None:
        return
    if (shape.vocab_size or 0) < manifest.vocab_size:
        yield f"reference.path: {directory} knows {shape.vocab_size} ids, the data has {manifest.vocab_size}"
    yield from _tokenizer_problems(tokenizer, directory, manifest)


def _tokenizer_problems(tokenizer: Tokenizer, directory: Path, manifest: Manifest) -> Iterator[str]:
    """Compare the reference's tokenizer with the data's: what ids mean, which ids a text becomes, how documents begin."""
    remedy = "prepare the data with the reference's tokenizer.json"
    found = fingerprint(tokenizer)
    if found != manifest.tokenizer_sha256:
        yield (
            f"reference.path: the tokenizer of {directory} differs from the one the data was prepared with "
            f"(sha256 of the id-to-token map {found[:12]}… and {manifest.tokenizer_sha256[:12]}…); {remedy}"
        )
        return
    found = identity(tokenizer)
    if manifest.tokenizer_identity not in (None, found):
        yield (
            f"reference.path: the tokenizer of {directory} has the ids of the data's, but makes other ids out of a text: its "
            f"normaliser, pre-tokeniser, merges or added tokens differ (identity {found[:12]}… and "
            f"{manifest.tokenizer_identity[:12]}…); {remedy}"
        )
    if manifest.bos is None:
        return

    # A reference scores a document as it was trained to see it: with its BOS token, or without one.
    try:
        bos_id = declared_bos_id(tokenizer, directory)
    except DataError as error:
        yield f"reference.path: {error}"
        return
    if bos_id != manifest.bos.id:
        yield (
            f"reference.path: the tokenizer of {directory} begins a text with {_named_token(tokenizer, bos_id)}, the data's "
            f"documents begin with {_named_token(tokenizer, manifest.bos.id)}; prepare the data with --bos auto and the "
            "reference's folder; or, if the reference was trained as the data is, say so by add_bos_token in its "
            "tokenizer_config.json"
        )


def _named_token(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "no BOS token" if token_id is None else f"{tokenizer.id_to_token(token_id)!r} (id {token_id})"


def _length_problems(directory: Path, settings: Settings) -> Iterator[str]:
    """Problems of the rows' length with the positions that a model was made for."""
    longest, length = read_max_positions(directory), settings.data.sequence_length
    if longest is not None and length > longest:
        yield (
            f"{directory} was made for {longest} positions (max_position_embeddings), data.sequence_length is {length}; "
            "prepare shorter rows, or raise it in config.json if the model can do with more"
        )


def _shape_differences(own: ModelSettings, found: ModelSettings) -> Iterator[tuple[str, Any, Any]]:
    """(key, own, found) where two shapes differ, after defaults that depend on other keys are filled in."""
    mine, theirs = (
        shape.model_dump(exclude={"seed", "pretrained", "num_prediction_heads"})
        | {
            "num_key_value_heads": shape.num_key_value_heads or shape.num_attention_heads,
            "head_dim": attention_head_dim(shape),
            "ffn_dim": ffn_dim(shape),
        }
        for shape in (own, found)
    )
    yield from ((key, mine[key], theirs[key]) for key in mine if mine[key] != theirs[key])
