"""Inputs: the files to read, their order, and their division into slices of work.

Files are read in the order of the inputs, and within a folder or glob in the order of their sorted paths, so the order depends
only on the input. Folders are read recursively, and links are followed. Names that begin with a dot are left out, as by a
shell's `*`.

A file is read once, whatever names lead to it: links, hard links, inputs that overlap. It is known by its device and inode, and
belongs to the first of its names. Copies of its content are other files. What a preparation writes is no input of it.

A *span* is a part of one file that can be read independently: bytes of a .jsonl, row groups of a .parquet, rows of a `hf:`
folder; for all other kinds, which can only be read from the beginning, the whole file. A *slice* is a list of consecutive
spans. It is the unit of work of a worker, and of resuming after a kill. The slices do not depend on the number of workers.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

from pipeline.data.corpus.columns import dataset_files, dataset_rows, row_groups
from pipeline.data.corpus.file_search import Identity, find_files, identity
from pipeline.data.errors import DataError

ACCEPTED_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar")
DATASET_PREFIX = "hf:"
DATASET = "datasets"

# The version of the rules by which files are cut into spans and these have documents, for work that goes on after an update.
SLICING = 2

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
    """A file, or a `hf:` folder. `kind` is one of ACCEPTED_SUFFIXES or DATASET; `size` in bytes; `changed` in ns since 1970;
    `names` counts the names under which the inputs hold it, of which `path` is the first."""

    path: str
    kind: str
    source: str
    size: int
    changed: int
    names: int = 1


@dataclass(frozen=True)
class Span:
    """A part of file number `file`: the bytes, row groups or rows [start, end). `size` is its share of the file's bytes, which
    are `file_size`; but for the last one, the spans of a .jsonl have `step` bytes each."""

    file: int
    path: str
    kind: str
    source: str
    start: int
    end: int
    size: int
    file_size: int
    step: int


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
        DataError: there is no such source, it has two weights, or a weight is not a positive number; a line for each.
    """
    weights: dict[str, float] = {}
    problems = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in names:
            known = f"the named inputs are {', '.join(names)}" if names else "no input has a name (--input NAME=PATH)"
            problems.append(f"--weight {argument}: there is no input named {name!r}; {known}")
        elif name in weights:
            problems.append(f"--weight {argument}: {name} has a weight already ({weights[name]})")
        else:
            weights[name] = _number(value)
            if not 0 < weights[name] <= 1000:
                problems.append(f"--weight {argument}: expected a number above 0 and at most 1000 after the equals sign")
    if problems:
        raise DataError("\n".join(problems))
    return weights


def _number(text: str) -> float:
    """The number that a text is; NaN if it is none, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def input_files(inputs: Iterable[Input], written: Sequence[Path] = ()) -> list[InputFile]:
    """List all files of the inputs, in order, each file once.

    Args:
        inputs: to list.
        written: folders that the preparation writes; what lies in them is left out.

    Raises:
        DataError: there are no files at a path, a file is of an unknown kind, or it is given as two kinds or to two sources;
            of several inputs that cannot be read, all are named.
    """
    found, problems = [], []
    for entry in inputs:
        try:
            found += _files_of(entry, written)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))

    files: dict[Identity | frozenset[Identity], InputFile] = {}
    for key, file in found:
        first = files.get(key)
        if first is None:
            files[key] = file
            continue

        # Another name of a file that is listed already.
        if first.source != file.source:
            raise DataError(
                f"the inputs {first.source!r} and {file.source!r} share a file: {first.path} and {file.path} are the same; "
                "leave it out of one of them"
            )
        if first.kind != file.kind:
            raise DataError(f"{first.path} and {file.path} are the same file, so it cannot be both; leave one of them out")
        files[key] = replace(first, names=first.names + 1)
    return list(files.values())


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
        return Span(number, file.path, file.kind, file.source, start, end, share, file.size, size)

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


def _files_of(entry: Input, written: Sequence[Path]) -> list[tuple[Identity | frozenset[Identity], InputFile]]:
    # A `hf:` folder counts as one file, and is the same as another one of the same files.
    if entry.path.startswith(DATASET_PREFIX):
        folder = entry.path.removeprefix(DATASET_PREFIX)
        stats = {path: os.stat(path) for path in dataset_files(folder)}
        size, changed = sum(stat.st_size for stat in stats.values()), max(stat.st_mtime_ns for stat in stats.values())
        key = frozenset(identity(path, stat) for path, stat in stats.items())
        return [(key, InputFile(folder, DATASET, entry.name, size, changed))]

    # A file, folder or glob.
    paths = find_files(entry.path)
    if not paths:
        name, equals, _ = entry.path.partition("=")
        rule = (
            f"; {name!r} is no name for a source, which has letters, digits, _ and - only" if equals and not entry.name else ""
        )
        raise DataError(
            f"no files at {entry.path!r}: expected a file, a folder with files in it, or a glob that matches some{rule}"
        )

    # What the preparation writes itself may lie below its input.
    paths = _outside(paths, written)
    if not paths:
        raise DataError(f"all files at {entry.path!r} lie in {written[0]}, the output; give another input or output")
    return [_file(path, entry.name) for path in paths]


def _file(path: Path, source: str) -> tuple[Identity, InputFile]:
    kind = next((suffix for suffix in ACCEPTED_SUFFIXES if path.name.lower().endswith(suffix)), None)
    if kind is None:
        raise DataError(
            f"cannot read {path}: its suffix is not one of {', '.join(ACCEPTED_SUFFIXES)}; "
            "convert it, or give a glob that leaves it out"
        )
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not S_ISREG(stat.st_mode):
        raise DataError(f"cannot read {path}: it is a pipe or device, and no file; write what it gives into a file")
    return identity(path, stat), InputFile(str(path), kind, source, stat.st_size, stat.st_mtime_ns)


def _outside(paths: list[Path], folders: Sequence[Path]) -> list[Path]:
    written = [os.path.realpath(folder) for folder in folders]

    @lru_cache(maxsize=1 << 10)
    def is_written(parent: Path) -> bool:
        real = os.path.realpath(parent)
        return any(real == folder or real.startswith(folder + os.sep) for folder in written)

    return [path for path in paths if not is_written(path.parent)]
