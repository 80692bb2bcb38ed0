"""Merging: join the parts of a data set, prepared separately, into one folder.

The shards of the parts are renumbered in the order of the parts. Their bytes stay the same: they are hard-linked where the
file system allows it, otherwise copied. The parts must agree in sequence length, tokenizer, sources and splits. If
`launch/prepare.py --part` made them, they must be all parts of one request, each once. No two parts may share a shard, because
its rows would come twice in every epoch.
"""

import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import (
    MANIFEST_FILE,
    InputCounts,
    Manifest,
    Preparation,
    Shard,
    Source,
    read_manifest,
    tokenizer_difference,
    write_manifest,
)
from pipeline.data.shards.output_folder import atomic_folder
from pipeline.data.shards.writer import shard_name

_SAME_IN_ALL_PARTS = ("sequence_length", "vocab_size", "source_names")
_SAME_IN_ONE_REQUEST = ("seed", "packing", "samples_per_shard", "validation", "weights", "whole_sha256")


def merge(parts: Sequence[Path], output_dir: Path) -> dict[Path, Manifest]:
    """Merge prepared folders, or folders of prepared splits, into `output_dir`.

    Returns:
        The manifest of each prepared folder of the output, by its path.

    Raises:
        DataError: the parts do not fit together, one is missing or named twice, or the output exists.
    """
    folders = prepared_folders(parts[0])
    merged = {}
    with atomic_folder(output_dir) as directory:
        for folder in folders:
            manifests = [read_manifest(part / folder, allow_empty=True) for part in parts]
            _check(parts, folders, manifests)
            (directory / folder).mkdir(exist_ok=True)
            shards = _link_shards(parts, folder, manifests, directory / folder)
            merged[output_dir / folder] = _merged(manifests, shards)
            shutil.copyfile(parts[0] / folder / manifests[0].tokenizer_file, directory / folder / manifests[0].tokenizer_file)
            write_manifest(directory / folder, merged[output_dir / folder])
    return merged


def prepared_folders(directory: Path) -> list[str]:
    """List the prepared folders at a path, relative to it: "." if it is one itself, else its prepared subfolders.

    Raises:
        DataError: there are none.
    """
    if (directory / MANIFEST_FILE).is_file():
        return ["."]
    folders = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST_FILE}"))
    if not folders:
        read_manifest(directory)  # raises an error that says what is missing
    return folders


def _check(parts: Sequence[Path], folders: Sequence[str], manifests: Sequence[Manifest]) -> None:
    for part, manifest in zip(parts, manifests, strict=True):
        if prepared_folders(part) != list(folders):
            raise DataError(f"{parts[0]} has the folders {', '.join(folders)}, {part} has {', '.join(prepared_folders(part))}")
        for name in _SAME_IN_ALL_PARTS:
            first, other = getattr(manifests[0], name), getattr(manifest, name)
            if first != other:
                raise DataError(
                    f"{parts[0]} and {part} do not belong together: {name} is {first} in one and {other} in the other"
                )

    # Each with every other one: what one manifest does not tell, two others may tell differently.
    for (part, manifest), (other_part, other) in itertools.combinations(zip(parts, manifests, strict=True), 2):
        if (difference := tokenizer_difference(manifest, other)) is not None:
            raise DataError(f"{part} and {other_part} do not belong together: {difference}")

    # Parts that prepare.py made must be complete and of one request.
    numbers = [manifest.preparation.part if manifest.preparation else None for manifest in manifests]
    if any(numbers):
        _check_numbers([number or "" for number in numbers])
        _check_requests(parts, [manifest.preparation for manifest in manifests if manifest.preparation])
    _check_shards(parts, manifests)


def _check_requests(parts: Sequence[Path], preparations: Sequence[Preparation]) -> None:
    for part, preparation in zip(parts, preparations, strict=True):
        for name in _SAME_IN_ONE_REQUEST:
            first, other = getattr(preparations[0], name), getattr(preparation, name)
            if first == other or (name == "whole_sha256" and None in (first, other)):
                continue
            what = "the input or another setting" if name == "whole_sha256" else name
            raise DataError(
                f"{parts[0]} and {part} are parts of different requests: {what} differs, {first} in one and {other} in the "
                "other; prepare all parts with the same command but for --part and --output"
            )


def _check_shards(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    seen: dict[str, int] = {}
    for number, (part, manifest) in enumerate(zip(parts, manifests, strict=True)):
        for shard in manifest.shards:
            first = seen.setdefault(shard.sha256, number)
            if first != number:
                raise DataError(
                    f"{parts[first]} and {part} have a shard in common ({shard.name} of the latter): its rows would be there "
                    "twice; name every part once"
                )


def _check_numbers(numbers: Sequence[str]) -> None:
    count = next(number for number in numbers if number).partition("/")[2]
    expected = [f"{number}/{count}" for number in range(1, int(count) + 1)]
    if sorted(numbers) != sorted(expected):
        missing = sorted(set(expected) - set(numbers)) or ["none"]
        unexpected = sorted(number or "no part" for number in numbers if number not in expected or numbers.count(number) > 1)
        raise DataError(
            f"expected all {count} parts of one preparation, each once; missing: {', '.join(missing)}; there twice or not of "
            f"it: {', '.join(unexpected) or 'none'}"
        )


def _in_order(parts: Sequence[Path], manifests: Sequence[Manifest]) -> list[tuple[Path, Manifest]]:
    """Sort parts by their numbers; without numbers they stay in the order of the command line."""

    def number(entry: tuple[Path, Manifest]) -> int:
        preparation = entry[1].preparation
        return int(preparation.part.partition("/")[0]) if preparation and preparation.part else 0

    return sorted(zip(parts, manifests, strict=True), key=number)


def _link_shards(parts: Sequence[Path], folder: str, manifests: Sequence[Manifest], directory: Path) -> list[Shard]:
    merged: list[Shard] = []
    for part, manifest in _in_order(parts, manifests):
        for shard in manifest.shards:
            name = shard_name(len(merged))
            for suffix in (".tar", ".tar.idx", ".tar.crc32"):
                _link(part / folder / f"{shard.name}{suffix}", directory / f"{name}{suffix}")
            merged.append(shard.model_copy(update={"name": name}))
    if not merged:
        raise DataError(f"none of the parts has a document in {folder}; give more input, or another fraction")
    return merged


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _merged(manifests: Sequence[Manifest], shards: Sequence[Shard]) -> Manifest:
    sources = tuple(
        Source(
            name=name,
            documents=sum(manifest.sources[index].documents for manifest in manifests),
            tokens=sum(manifest.sources[index].tokens for manifest in manifests),
        )
        for index, name in enumerate(manifests[0].source_names)
    )
    preparations = [manifest.preparation for manifest in manifests if manifest.preparation]
    changes: dict[str, Any] = {"shards": tuple(shards), "sources": sources}
    # What one part does not tell is not known of the whole.
    for name in ("tokenizer_identity", "bos"):
        known = [getattr(manifest, name) for manifest in manifests]
        changes[name] = None if None in known else known[0]
    preparation = _merged_preparation(preparations) if len(preparations) == len(manifests) else None
    return manifests[0].model_copy(update={**changes, "preparation": preparation})


def _merged_preparation(preparations: Sequence[Preparation]) -> Preparation:
    counts = {name: sum(getattr(each.input, name) for each in preparations) for name in InputCounts.model_fields}
    return preparations[0].model_copy(
        update={
            "input": InputCounts(**counts),
            # A hash of its own: with that of the first part, this part's command would take the merged folder for its output.
            "request_sha256": hashlib.sha256("\n".join(each.request_sha256 for each in preparations).encode()).hexdigest(),
            "part": None,
            "whole_sha256": None,
            "contents": None,
            "documents": sum(each.documents for each in preparations),
            "documents_cut": sum(each.documents_cut for each in preparations),
        }
    )
