"""Documents from files: `.txt` (one document a file) and `.jsonl` (one a line), by file, folder or glob.

The order is that of the inputs, and within a folder or glob that of the sorted paths, so it depends on nothing but the
input. Nothing is dropped in silence: a file that cannot be read as promised is an error that names file and line, and
documents without text are counted. Folders are read recursively and through links; names that begin with a dot are left
out, as a shell's `*` leaves them out.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.manifest import DataError

ACCEPTED_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text and the name of its source, "" where the inputs have no names."""

    text: str
    source: str


@dataclass(frozen=True)
class Input:
    """One `--input`: a file, folder or glob, and its source's name ("" for none)."""

    name: str
    path: str


def parse_input(argument: str) -> Input:
    """Read `NAME=PATH` or `PATH`; a path with an equals sign is written `./a=b.txt`."""
    name, equals, path = argument.partition("=")
    if equals and re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        return Input(name, path)
    return Input("", argument)


def source_names(inputs: Iterable[Input]) -> list[str]:
    """The distinct names in the order of their first mention; empty if no input has one.

    Raises:
        DataError: some inputs have names and some have none.
    """
    names = list(dict.fromkeys(entry.name for entry in inputs))
    if "" not in names:
        return names
    if len(names) > 1:
        raise DataError(f"some inputs have names ({', '.join(filter(None, names))}) and some have none: name all or none")
    return []


class DocumentReader:
    """The documents of some inputs; may be iterated again, and counts as it goes.

    `num_documents` and `num_empty` are those of the iteration last begun; empty documents (nothing but white space) are
    counted and not yielded.
    """

    def __init__(self, inputs: Iterable[Input], text_field: str = "text") -> None:
        self.inputs = tuple(inputs)
        self.text_field = text_field
        self.num_documents = 0
        self.num_empty = 0

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order.

        Raises:
            DataError: nothing at a path, an unknown suffix, bytes that are not UTF-8, a line without the text field.
        """
        self.num_documents = self.num_empty = 0
        for entry in self.inputs:
            for file in _files(entry.path):
                for text in _texts(file, self.text_field):
                    if text.strip():
                        self.num_documents += 1
                        yield Document(text, entry.name)
                    else:
                        self.num_empty += 1


def _files(path: str) -> list[Path]:
    matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
    files = [file for match in matches for file in (_files_below(match) if os.path.isdir(match) else [Path(match)])]
    if not files:
        raise DataError(f"no files at {path!r}: expected a file, a folder with files in it, or a glob that matches some")
    for file in files:
        if file.suffix not in ACCEPTED_SUFFIXES:
            raise DataError(
                f"cannot read {file}: its suffix is not one of {', '.join(ACCEPTED_SUFFIXES)}; "
                "convert it, or give a glob that leaves it out"
            )
    return files


def _files_below(folder: str) -> list[Path]:
    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if name[0] != "." and _is_new(os.path.join(parent, name), seen)]
        files += [Path(parent, name) for name in names if name[0] != "."]
    return sorted(files)


def _is_new(folder: str, seen: set[str]) -> bool:
    # A link to a folder already listed would read its files twice, or for ever.
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True


def _texts(file: Path, text_field: str) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            yield _decode(file.read_bytes(), file, 1)
        else:
            yield from _json_lines(file, text_field)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _json_lines(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(_decode(line, file, number), text_field, f"{file}, line {number}")


def _decode(data: bytes, file: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from None


def _text_of(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object a line: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if text_field not in record:
        fields = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(f"{where}: no field {text_field!r}; its fields are {fields}; name the right one with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: expected text in field {text_field!r}, got {type(text).__name__}")
    return _without_surrogates(text, where)


def _without_surrogates(text: str, where: str) -> str:
    # JSON can spell half a surrogate pair (\ud800), which is no character and which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} of the text is half a surrogate pair; mend the line") from None
    return text
