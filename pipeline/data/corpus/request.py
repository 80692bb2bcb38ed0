"""The request: what a preparation was asked for, so that nobody goes on with another one, or makes the same twice."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.corpus.inputs import InputFile
from pipeline.data.corpus.prepare import Settings
from pipeline.data.errors import DataError
from pipeline.data.shards.output_folder import REQUEST_FILE, clear
from pipeline.storage.whole_file import write_file


def describe(
    files: Sequence[InputFile], tokenizer: Tokenizer | int, settings: Settings, names: Sequence[str]
) -> dict[str, Any]:
    """What is asked for. Undecodable documents are left out: what was done while they were an error had none.

    Of files that is their names and sizes. When they were changed is asked of unfinished work only (`begin_or_continue`):
    input that was copied or fetched again, or part of which lies on another machine, is still the same, so finished data does
    not know an edit that keeps a file's size, and `launch/prepare.py` says by what it knew its data.
    """
    sizes = hashlib.sha256()
    for file in files:
        sizes.update(f"{file.source} {os.path.basename(file.path)} {file.size}\n".encode("utf-8", "surrogateescape"))
    asked = {name: value for name, value in asdict(settings).items() if name != "rules"}
    return {
        "input files": sizes.hexdigest(),
        "sources": list(names),
        "tokenizer": tokenizer if isinstance(tokenizer, int) else hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "text_field": settings.rules.text_field,
        "max_document_bytes": settings.rules.max_document_bytes,
        **json.loads(json.dumps(asked)),
    }


def request_sha256(request: dict[str, Any]) -> str:
    """By which a finished folder is known to be what is asked for."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def whole_sha256(request: dict[str, Any]) -> str | None:
    """By which parts are known to be of one request: its hash without the part; None where there is no part."""
    return request_sha256({**request, "part": None}) if request["part"] else None


def begin_or_continue(partial: Path, files: Sequence[InputFile], request: dict[str, Any]) -> bool:
    """Write the request down, or hold it against the one that is there; whether there was one.

    Raises:
        DataError: it was another one, or the input has changed since.
    """
    changed = [(file.path, file.changed) for file in files]
    asked = {**request, "times of change": hashlib.sha256(json.dumps(changed).encode()).hexdigest()}
    path = partial / REQUEST_FILE
    if path.exists():
        begun = json.loads(path.read_bytes())
        differences = [name for name in asked if begun.get(name) != asked[name]]
        if differences:
            listed = "; ".join(f"{name}: {begun.get(name)} there, {asked[name]} now" for name in differences)
            raise DataError(
                f"{partial} was begun with another request ({listed}); ask for the same to go on, or remove it to begin anew"
            )
        return True
    # Of a run that was killed before it had a request.
    clear(partial)
    write_file(path, json.dumps(asked, indent=2).encode())
    return False
