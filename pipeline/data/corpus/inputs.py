"""Inputs: the files to read, their order, and their division into slices of work.

Files are read in the order of the inputs, and within a folder or glob in the order of their sorted paths, so the order depends
only on the input. Folders are read recursively, and links are followed. Names that begin with a dot are left out, as by a
shell's `*`.

A *span* is a part of one file that can be read independently: bytes of a .jsonl, row groups of a .parquet, rows of a `hf:`
folder; for all other kinds, which can only be read from the beginning, the whole file. A *slice* is a list of consecutive
spans. It is the unit of work of a worker, and of resuming after a kill. The slices do not depend on the number of workers.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.corpus.columns import dataset_files, dataset_rows, row_groups
from pipeline.data.errors import DataError

ACCEPTED_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar")
DATASET_PREFIX = "hf:"
DATASET = "datasets"

# In bytes: small enough to keep many workers busy until the end, large enough to be worth a file of its own.
_LARGEST_SLICE = 1 << 25
_SMALLEST_SLICE = 1 << 16
_WANTED_SLICES = 64
_FILES_PER_SLICE = 4096


@dataclass(frozen=True)
class Input:
    """One `--input`: a file, folder, glob or `hf:` folder, and its source's name ("" for none)."""

    name: str
    path: str


@dataclass(frozen=True)
class InputFile:
    """A file, or a `hf:` folder. `kind` is one of ACCEPTED_SUFFIXES or DATASET; `size` in bytes; `changed` in ns since 1970."""

    path: str
    kind: str
    source: str
    size: int
    changed: int


@dataclass(frozen=True)
class Span:
    """A part of file number `file`: the bytes, row groups or rows [start, end). `size` is its share of the file's bytes."""

    file: int
    path: str
    kind: str
    source: str
    start: int
    end: int
    size: int


def parse_input(argument: str) -> Input:
    """Parse `NAME=PATH` or `PATH`; a path with an equals sign is written `./a=b.txt`."""
    name, equals, path = argument.partition("=")
    if equals and re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        return Input(name, path)
    return Input("", argument)


def source_names(inputs: Iterable[Input]) -> list[str]:
    """List the distinct names of inputs in the order of their first mention; empty if no input has a name.

    Raises:
        DataError: some inputs have names and some have none.
    """
    names = list(dict.fromkeys(entry.name for entry in inputs))
    if "" not in names:
        return names
    if len(names) > 1:
        raise DataError(f"some inputs have names ({', '.join(filter(None, names))}) and some have none: name all or none")
    return []


def parse_weights(arguments: Iterable[str], names: Sequence[str]) -> dict[str, float]:
    """Parse `NAME=WEIGHT` arguments for the sources `names`.

    Raises:
        DataError: there is no such source, it has two weights, or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in names:
            known = f"the named inputs are {', '.join(names)}" if names else "no input has a name (--input NAME=PATH)"
            raise DataError(f"--weight {argument}: there is no input named {name!r}; {known}")
        if name in weights:
            raise DataError(f"--weight {argument}: {name} has a weight already ({weights[name]})")

        # The value; what is no number fails the check of the range.
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] <= 1000:
            raise DataError(f"--weight {argument}: expected a number above 0 and at most 1000 after the equals sign")
    return weights


def input_files(inputs: Iterable[Input]) -> list[InputFile]:
    """List all files of the inputs, in order.

    Raises:
        DataError: there are no files at a path, or a file is of an unknown kind.
    """
    return [file for entry in inputs for file in _files_of(entry)]


def slice_size(files: Sequence[InputFile], parts: int = 1) -> int:
    """Choose the size of slices in bytes, to keep the workers of each of `parts` machines busy."""
    size = sum(file.size for file in files) // (_WANTED_SLICES * parts)
    return min(max(size, _SMALLEST_SLICE), _LARGEST_SLICE)


def slices(files: Sequence[InputFile], size: int) -> list[list[Span]]:
    """Divide the whole input into slices of about `size` bytes."""
    result: list[list[Span]] = []
    num_bytes = 0
    for span in (span for number, file in enumerate(files) for span in _spans(number, file, size)):
        if not result or num_bytes + span.size > size or len(result[-1]) == _FILES_PER_SLICE:
            result.append([])
            num_bytes = 0
        result[-1].append(span)
        num_bytes += span.size
    return result


def _spans(number: int, file: InputFile, size: int) -> Iterator[Span]:
    def span(start: int, end: int, share: int) -> Span:
        return Span(number, file.path, file.kind, file.source, start, end, share)

    if file.kind == ".jsonl":
        for start in range(0, file.size, size):
            end = min(start + size, file.size)
            yield span(start, end, end - start)
    elif file.kind == ".parquet":
        start = num_bytes = 0
        groups = row_groups(file.path)
        for group, group_size in enumerate(groups):
            num_bytes += group_size
            if num_bytes >= size or group == len(groups) - 1:
                yield span(start, group + 1, num_bytes)
                start, num_bytes = group + 1, 0
    elif file.kind == DATASET:
        rows = dataset_rows(file.path)
        step = max(1, rows * size // max(file.size, 1))
        for start in range(0, rows, step):
            end = min(start + step, rows)
            yield span(start, end, file.size * (end - start) // rows)
    else:
        yield span(0, file.size, file.size)


def _files_of(entry: Input) -> list[InputFile]:
    # A `hf:` folder counts as one file.
    if entry.path.startswith(DATASET_PREFIX):
        folder = entry.path.removeprefix(DATASET_PREFIX)
        stats = [os.stat(file) for file in dataset_files(folder)]
        return [
            InputFile(folder, DATASET, entry.name, sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats))
        ]

    # A file, folder or glob.
    paths = _paths(entry.path)
    if not paths:
        name, equals, _ = entry.path.partition("=")
        rule = (
            f"; {name!r} is no name for a source, which has letters, digits, _ and - only" if equals and not entry.name else ""
        )
        raise DataError(
            f"no files at {entry.path!r}: expected a file, a folder with files in it, or a glob that matches some{rule}"
        )
    return [_file(path, entry.name) for path in paths]


def _file(path: Path, source: str) -> InputFile:
    kind = next((suffix for suffix in ACCEPTED_SUFFIXES if path.name.endswith(suffix)), None)
    if kind is None:
        raise DataError(
            f"cannot read {path}: its suffix is not one of {', '.join(ACCEPTED_SUFFIXES)}; "
            "convert it, or give a glob that leaves it out"
        )
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return InputFile(str(path), kind, source, stat.st_size, stat.st_mtime_ns)


def _paths(path: str) -> list[Path]:
    matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
    return [file for match in matches for file in (_files_below(match) if os.path.isdir(match) else [Path(match)])]


def _files_below(folder: str) -> list[Path]:
    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if name[0] != "." and _is_new(os.path.join(parent, name), seen)]
        files += [Path(parent, name) for name in names if name[0] != "."]
    return sorted(files)


def _is_new(folder: str, seen: set[str]) -> bool:
    # Following a link to a folder that is listed already would read its files twice, or loop for ever.
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True
