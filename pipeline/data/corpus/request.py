"""The request of a preparation: all settings and the input, to resume the same request and to recognise its finished output."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.corpus.inputs import SLICING, InputFile
from pipeline.data.corpus.prepare import PrepareSettings
from pipeline.data.errors import DataError
from pipeline.data.shards.output_folder import FAILED_FILE, REQUEST_FILE, clear
from pipeline.data.tokenizer import END_OF_DOCUMENT, usual_end_of_document
from pipeline.storage.whole_file import write_file


def describe(
    files: Sequence[InputFile], tokenizer: Tokenizer | int, settings: PrepareSettings, names: Sequence[str]
) -> dict[str, Any]:
    """Describe a request as JSON values: the settings, the tokenizer, and the names and sizes of the input files.

    Two things are left out on purpose. `on_undecodable`, because work that was finished while undecodable documents were an
    error had none. And the files' times of change, so that input that was copied again, or lies on another machine, is still
    the same input. An edit that keeps a file's size is noticed in finished data by its contents (`contents`), and in unfinished
    work by the times (`begin_or_continue`).
    """
    sizes = hashlib.sha256()
    for file in files:
        sizes.update(f"{file.source} {os.path.basename(file.path)} {file.size}\n".encode("utf-8", "surrogateescape"))
    # Without a BOS token and declared tokens the request is the one it was before there was a choice; a usual end need not be
    # named.
    left_out = {"rules", "bos_rule"} | {name for name in ("bos", "special") if not getattr(settings, name)}
    requested = {name: value for name, value in asdict(settings).items() if name not in left_out}
    usual = END_OF_DOCUMENT if isinstance(tokenizer, int) else usual_end_of_document(tokenizer)
    if requested["end_of_document"] == usual:
        requested["end_of_document"] = None

    # Parts that were made by other rules of slicing do not complete each other; whole data does not depend on these.
    slicing = {"slicing": SLICING} if settings.part else {}
    return {
        "input files": sizes.hexdigest(),
        "sources": list(names),
        "tokenizer": tokenizer if isinstance(tokenizer, int) else hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "text_field": settings.rules.text_field,
        "max_document_bytes": settings.rules.max_document_bytes,
        **json.loads(json.dumps(requested)),
        **slicing,
    }


def request_sha256(request: dict[str, Any]) -> str:
    """Hash a request, to recognise a finished folder by it."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def whole_sha256(request: dict[str, Any]) -> str | None:
    """Hash a request without its part, which is equal for all parts of one request; None if the request has no part."""
    return request_sha256({**request, "part": None}) if request["part"] else None


def begin_or_continue(partial: Path, files: Sequence[InputFile], request: dict[str, Any]) -> bool:
    """Write the request into the partial folder, or compare it with the one there; returns true if there was one.

    Raises:
        DataError: the one there is another request, or the input has changed since, and it did not end with an error.
    """
    changed = [(file.path, file.changed) for file in files]
    requested = {**request, "slicing": SLICING, "times of change": hashlib.sha256(json.dumps(changed).encode()).hexdigest()}
    path = partial / REQUEST_FILE

    # Resume.
    if path.exists():
        try:
            existing = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({error}); remove {partial} to begin anew") from None
        differences = [name for name in requested if existing.get(name) != requested[name]]
        if differences:
            # Work that ended with an error was for a request that the user has mended since.
            if (partial / FAILED_FILE).exists():
                return _begin(partial, requested)
            listed = "; ".join(
                _IN_WORDS.get(name, f"{name}: {existing.get(name)} there, {requested[name]} now") for name in differences
            )
            raise DataError(
                f"{partial} was begun with another request ({listed}); ask for the same to go on, or remove it to begin anew"
            )
        (partial / FAILED_FILE).unlink(missing_ok=True)
        return True

    # Files without a request are from a process that was killed early.
    return _begin(partial, requested)


def _begin(partial: Path, requested: dict[str, Any]) -> bool:
    clear(partial)
    write_file(partial / REQUEST_FILE, json.dumps(requested, indent=2).encode())
    return False


_IN_WORDS = {
    "input files": "other input files",
    "times of change": "input files that were changed since",
    "tokenizer": "another tokenizer",
    "slicing": "cut by rules of another version",
}
"""Sentences for the differences that are hashes."""
