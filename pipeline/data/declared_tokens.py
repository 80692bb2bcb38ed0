"""Tokens that a folder declares special beside its tokenizer.

`tokenizer.json` marks its own special tokens. `tokenizer_config.json` and `special_tokens_map.json` may name others, such as
the padding token or the roles of a chat: transformers adds them when it loads the tokenizer, and a model that met their ids in
text would take text for structure. A prepared folder says in its manifest which ones it was made with.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.errors import DataError
from pipeline.data.tokenizer import describe, read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
MANIFEST = "manifest.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def declared_tokens(tokenizer: Tokenizer, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the tokens that a folder declares special and the tokenizer does not, sorted.

    Returns:
        Those that can be kept out of texts, and those of a single character that are none of the added tokens: these are
        characters of text all the same, and nothing could tell the two apart (CLIP's folders pad with "!").

    Raises:
        DataError: a declaration cannot be read.
    """
    added = {token["content"]: token["special"] for token in describe(tokenizer)["added_tokens"]}
    declared = {token for token in _declared(Path(folder)) if tokenizer.token_to_id(token) is not None and not added.get(token)}
    characters = {token for token in declared if len(token) == 1 and token not in added}
    return tuple(sorted(declared - characters)), tuple(sorted(characters))


def token_text(declared: Any, file: Path, key: str) -> str | None:
    """Take the text of a token that a file declares, as a string or an object; None for null.

    Raises:
        DataError: it is something else.
    """
    token = declared.get("content") if isinstance(declared, dict) else declared
    if declared is not None and not isinstance(token, str):
        raise DataError(f"{file}: expected a token in {key}, got {json.dumps(declared)[:80]}; correct the file")
    return token


def _declared(folder: Path) -> Iterator[str]:
    preparation = read_json(folder / MANIFEST).get("preparation")
    if isinstance(preparation, dict):
        yield from preparation.get("special") or ()
    for file in (folder / TOKENIZER_CONFIG, folder / _SPECIAL_TOKENS_MAP):
        for key, declaration in _declarations(read_json(file), file):
            token = token_text(declaration, file, key)
            if token is not None:
                yield token


def _declarations(content: dict[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each declaration of a special token, and its key."""
    # pad_token, mask_token, image_token and others; add_bos_token and num_image_token say something else.
    for key, value in content.items():
        if key.endswith("_token") and isinstance(value, str | dict):
            yield key, value
    for key in _LISTS:
        for declaration in _entries(content.get(key), file, key):
            yield key, declaration
    for declaration in _entries(content.get("added_tokens_decoder"), file, "added_tokens_decoder"):
        if isinstance(declaration, dict) and declaration.get("special"):
            yield "added_tokens_decoder", declaration


def _entries(value: Any, file: Path, key: str) -> list[Any]:
    """The entries of a list, or of an object by their names."""
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, dict):
        return list(value.values())
    raise DataError(f"{file}: expected a list of tokens in {key}, got {json.dumps(value)[:80]}; correct the file")
