"""Check the reference and the pretrained weights against the settings and the data.

A problem is a sentence: the key, the value found, the value expected, the remedy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.config import ModelSettings, Settings
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import Manifest
from pipeline.data.special_tokens import declared_bos_id
from pipeline.data.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILE, load_tokenizer, other_tokenizer
from pipeline.derived import next_token_model
from pipeline.model.huggingface import ModelFilesError, read_model_settings, weight_problems
from pipeline.model.layout import read_longest_row
from pipeline.model.model_config import family_of
from pipeline.model.transformer import attention_head_dim, ffn_dim


def model_problems(settings: Settings, manifest: Manifest | None) -> list[str]:
    """Problems of model, reference and pretrained weights with the data. manifest: None if not known yet."""
    problems = []
    needed = manifest.vocab_size if manifest else 0
    if settings.model.vocab_size is not None and settings.model.vocab_size < needed:
        problems.append(
            f"model.vocab_size: {settings.model.vocab_size} is too small for the data's {needed} ids; leave it unset"
        )
    try:
        family_of(settings.model)
    except ModelFilesError as error:
        problems.append(f"model: {error}")
    problems += reference_problems(settings, manifest)
    problems += _pretrained_problems(settings, manifest)
    return problems


def _pretrained_problems(settings: Settings, manifest: Manifest | None) -> list[str]:
    """Problems of pretrained weights, which must have the policy's shape, and of the tokenizer beside them."""
    directory = settings.model.pretrained
    if directory is None:
        return []
    try:
        found = read_model_settings(directory)
    except ModelFilesError as error:
        return [f"model.pretrained: {error}"]

    # Rows and ids.
    problems = [f"model.pretrained: {problem}" for problem in _length_problems(directory, settings)]
    needed = manifest.vocab_size if manifest else 0
    if (found.vocab_size or 0) < needed:
        problems.append(
            f"model.pretrained: {directory} knows {found.vocab_size} ids, the data has {needed}; prepare the data with the "
            "model's own tokenizer"
        )
    problems += _pretrained_tokenizer_problems(directory, manifest)

    # The shape, then the tensors.
    own = settings.model.model_copy(update={"vocab_size": settings.model.vocab_size or found.vocab_size})
    differences = [
        f"model.{key}: {mine!r}, but {directory} has {theirs!r}; they must be equal"
        for key, mine, theirs in _shape_differences(own, found)
    ]
    return problems + (differences or [f"model.pretrained: {problem}" for problem in weight_problems(own, directory)])


def _pretrained_tokenizer_problems(directory: Path, manifest: Manifest | None) -> Iterator[str]:
    """Compare the tokenizer that lies beside pretrained weights, if one does, with the data's."""
    if manifest is None or not any((directory / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        return
    try:
        other = other_tokenizer(load_tokenizer(directory), manifest.tokenizer_sha256, manifest.tokenizer_identity)
    except DataError as error:
        other = f"cannot be used: {error}"
    if other is not None:
        yield (
            f"model.pretrained: the tokenizer of {directory} {other}; prepare the data with the model's own tokenizer.json (or "
            "take its tokenizer out of the folder, if the policy is to learn another one)"
        )


def reference_problems(settings: Settings, manifest: Manifest | None, compared: bool = True) -> Iterator[str]:
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
    other = other_tokenizer(tokenizer, manifest.tokenizer_sha256, manifest.tokenizer_identity)
    if other is not None:
        yield (f"reference.path: the tokenizer of {directory} {other}; prepare the data with the reference's tokenizer.json")
        return
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
    longest, length = read_longest_row(directory), settings.data.sequence_length
    if longest is not None and length > longest.num_tokens:
        remedy = (
            "a longer row is another computation there, which is not supported: prepare shorter rows"
            if longest.is_exact
            else "prepare shorter rows, or raise it in config.json if the model can do with more"
        )
        made_for = f"{longest.num_tokens} positions ({longest.key})"
        yield f"{directory} was made for {made_for}, data.sequence_length is {length}; {remedy}"


def _shape_differences(own: ModelSettings, found: ModelSettings) -> Iterator[tuple[str, Any, Any]]:
    """(key, own, found) where two shapes differ, after defaults that depend on other keys are filled in."""
    mine, theirs = (
        shape.model_dump(exclude={"size", "seed", "pretrained", "new_heads", "num_prediction_heads"})
        | {
            "num_key_value_heads": shape.num_key_value_heads or shape.num_attention_heads,
            "head_dim": attention_head_dim(shape),
            "ffn_dim": ffn_dim(shape),
        }
        for shape in (own, found)
    )
    yield from ((key, mine[key], theirs[key]) for key in mine if mine[key] != theirs[key])
