"""Adoption: make a prepared folder of token tars that others wrote, for example with `webdataset.ShardWriter`.

The tars must have the members that `writer` documents: KEY.tokens.npy, KEY.documents.npy and, for named sources,
KEY.sources.npy. They are not changed. Offsets and checksums are written beside them. Existing index files are compared with
the tar and not replaced, because new ones would declare damage to be data; an existing tokenizer.json must be the same
tokenizer. Then every sample is read by the reader that feeds training, and the manifest is written only if all are good.
Nothing of a tar is ever extracted to disk, and an unexpected member is an error that names it.
"""

import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest, Shard, Source, write_manifest
from pipeline.data.shards.output_folder import locked
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.table import NAME, crc32_of_chunks
from pipeline.data.shards.tars import Member, members, read_member
from pipeline.data.shards.verification import SourceCounts, count_row, file_sha256
from pipeline.data.shards.writer import CRC, MAX_SOURCES, OFFSET
from pipeline.data.tokenizer import TOKENIZER_FILE, end_of_document_id, fingerprint, identity, load_tokenizer, vocab_size
from pipeline.storage.whole_file import write_file

_REQUIRED = {"tokens.npy", "documents.npy"}
_SOURCES = "sources.npy"
# A row of four million ids. A larger member cannot be a row, and is not read.
_MAX_MEMBER_BYTES = 1 << 24
# The folder belongs to somebody else, so the name must not be one of their files.
_LOCK_FILE = ".index.lock"


def index(
    directory: Path, tokenizer: Tokenizer, *, source_names: Sequence[str] = (), end_of_document: str | None = None
) -> Manifest:
    """Write the manifest and index files of a folder of token tars.

    Args:
        directory: with the tars.
        tokenizer: with which the ids were made.
        source_names: in the order of the indices in KEY.sources.npy; empty to name the sources that occur `source-0` and so on.
        end_of_document: the tokenizer's token that ends a document; None for one of the usual names.

    Returns:
        The manifest written.

    Raises:
        DataError: the folder has a manifest already, no tars, or another tokenizer; another process is indexing it; a sample
            is damaged or malformed; or a tar does not fit the index files beside it.
    """
    directory = Path(directory)
    _refuse_if_adopted(directory)
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise DataError(f"expected shards, *.tar, in {directory}, but there are none")
    with locked(directory, _LOCK_FILE):
        try:
            _refuse_if_adopted(directory)  # again: the previous holder of the lock may have finished
            _clear_leftovers(directory)
            return _adopt(directory, paths, tokenizer, list(source_names), end_of_document)
        finally:
            (directory / _LOCK_FILE).unlink()


def _refuse_if_adopted(directory: Path) -> None:
    if (directory / MANIFEST_FILE).exists():
        raise DataError(
            f"{directory / MANIFEST_FILE} is there already; check the folder with `launch/shards.py verify {directory}`"
        )


def _clear_leftovers(directory: Path) -> None:
    """Remove the temporary files of a killed process."""
    for kind in ("tar.idx", "tar.crc32", "json"):
        for leftover in directory.glob(f"*.{kind}.*.tmp"):
            leftover.unlink()


def _adopt(
    directory: Path, paths: Sequence[Path], tokenizer: Tokenizer, source_names: list[str], end_of_document: str | None
) -> Manifest:
    _check_tokenizer(directory / TOKENIZER_FILE, tokenizer)
    written: list[Path] = []
    try:
        manifest = _index(paths, tokenizer, source_names, end_of_document, written)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    if not (directory / TOKENIZER_FILE).exists():
        write_file(directory / TOKENIZER_FILE, tokenizer.to_str(pretty=True).encode())
    write_manifest(directory, manifest)
    return manifest


def _check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer in the folder, if there is one, with the given tokenizer."""
    if path.exists() and identity(load_tokenizer(path)) != identity(tokenizer):
        raise DataError(
            f"{path}, which was there before, is another tokenizer than the one given; leave --tokenizer out if the ids were "
            "made with it, or move it away if they were not"
        )


def _index(
    paths: Sequence[Path], tokenizer: Tokenizer, source_names: list[str], end_of_document: str | None, written: list[Path]
) -> Manifest:
    """Index every tar, then read and count every sample. Appends each file that it writes to `written`."""
    # Offsets and checksums.
    indexed = [_index_tar(path, written) for path in paths]
    _refuse_copies([shard for shard, _ in indexed])

    # Sources must be in all samples or in none.
    kinds = {kinds for _, kinds in indexed}
    if len(kinds) > 1:
        raise DataError(f"some samples of {paths[0].parent} have {_SOURCES} and some have none; it must be all or none")
    has_sources = _SOURCES in kinds.pop()
    if source_names and not has_sources:
        raise DataError(f"sources were named, but the samples have no {_SOURCES}")
    names = (source_names or [f"source-{number}" for number in range(MAX_SOURCES)]) if has_sources else []

    # A manifest without counts of tokens and documents, with which the samples can be read; then the counts.
    manifest = Manifest(
        sequence_length=_sequence_length(paths[0]),
        vocab_size=vocab_size(tokenizer),
        end_of_document_id=end_of_document_id(tokenizer, end_of_document),
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=fingerprint(tokenizer),
        tokenizer_identity=identity(tokenizer),
        sources=tuple(Source(name=name, documents=0, tokens=0) for name in names),
        shards=tuple(shard for shard, _ in indexed),
    )
    return _counted(paths[0].parent, manifest, len(source_names))


def _refuse_copies(shards: Sequence[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        first = seen.setdefault(shard.sha256, shard.name)
        if first != shard.name:
            raise DataError(
                f"{shard.name}.tar is the same file as {first}.tar: its rows would come twice in every epoch; move one away"
            )


def _index_tar(path: Path, written: list[Path]) -> tuple[Shard, frozenset[str]]:
    if not re.fullmatch(NAME, path.stem):
        raise DataError(f"the name of {path} must be letters, digits, and _ - . (not first); rename it")

    # Offsets of all samples, which are consecutive members with the same key.
    offsets, end, kinds = [], 0, set()
    for key, sample in itertools.groupby(_checked_members(path), key=lambda member: member.name.partition(".")[0]):
        found = list(sample)
        names = frozenset(member.name.removeprefix(f"{key}.") for member in found)
        if len(names) != len(found) or not names >= _REQUIRED:
            raise DataError(
                f"shard {path.stem}, sample {key!r}: expected the members {', '.join(sorted(_REQUIRED))} and perhaps "
                f"{_SOURCES}, each once and together, got {', '.join(member.name for member in found)}"
            )
        kinds.add(names)
        offsets.append(found[0].header)
        end = found[-1].end
    if len(kinds) != 1:
        raise DataError(f"shard {path.stem}: " + ("it has no samples" if not kinds else f"only some samples have {_SOURCES}"))

    # Index files: compare with those that exist, write the others.
    bounds = np.array([*offsets, end], OFFSET).tobytes()
    checksums = _checksums(path, [*offsets, end]).tobytes()
    new = {path.with_name(f"{path.name}{suffix}"): data for suffix, data in ((".idx", bounds), (".crc32", checksums))}
    for index_file, data in list(new.items()):
        if index_file.exists():
            _compare(path, index_file, data)
            del new[index_file]
    for index_file, data in new.items():
        written.append(index_file)
        write_file(index_file, data)

    shard = Shard(
        name=path.stem,
        samples=len(offsets),
        tokens=0,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        crc32=crc32_of_chunks(checksums),
    )
    return shard, kinds.pop()


def _compare(tar: Path, index_file: Path, expected: bytes) -> None:
    """Compare an existing index file, one number for each sample, with the contents computed from the tar."""
    size = (OFFSET if index_file.suffix == ".idx" else CRC).itemsize
    found = index_file.read_bytes()
    if found == expected:
        return
    starts = range(0, len(expected), size)
    sample = next((n // size for n in starts if found[n : n + size] != expected[n : n + size]), len(starts))
    raise DataError(
        f"shard {tar.stem}: {index_file}, which was there before, does not fit the tar ({len(found)} bytes, expected "
        f"{len(expected)}; first difference at sample {sample}): one of them is damaged; copy both again, or remove "
        f"{index_file.name} if the tar is known to be right"
    )


def _checked_members(path: Path) -> Iterator[Member]:
    """Iterate over the members of a tar, and refuse every member that does not belong to a sample."""
    seen: set[str] = set()
    for member in members(path):
        where = f"shard {path.stem}, member {member.name!r}"
        key, _, kind = member.name.partition(".")

        # A plain file, of a sample's name and size, once.
        if not member.is_file:
            raise DataError(f"{where}: expected plain files, got a folder, link or device; nothing of it was read")
        if "/" in key or "\\" in key or not key or kind not in _REQUIRED | {_SOURCES}:
            raise DataError(
                f"{where}: expected KEY.tokens.npy, KEY.documents.npy and perhaps KEY.{_SOURCES}, whose KEY has neither dots "
                "nor slashes; nothing of it was read"
            )
        if member.size > _MAX_MEMBER_BYTES:
            raise DataError(
                f"{where}: it has {member.size:,} bytes, no row is larger than {_MAX_MEMBER_BYTES:,}; it was not read"
            )
        if member.name in seen:
            raise DataError(f"{where}: it is there twice")

        seen.add(member.name)
        yield member


def _checksums(path: Path, offsets: Sequence[int]) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(offsets[0])
        return np.array([zlib.crc32(file.read(end - start)) for start, end in itertools.pairwise(offsets)], CRC)


def _sequence_length(path: Path) -> int:
    """Read the length of the first row. The reader checks that all others have the same length."""
    with open(path, "rb") as file:
        row = next(member for member in members(path) if member.name.endswith(".tokens.npy"))
        stream = io.BytesIO(read_member(file, row))
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, _ = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise DataError(f"shard {path.stem}, member {row.name!r}: {error}") from None
    if version != (1, 0) or len(shape) != 1 or shape[0] < 1:
        raise DataError(f"shard {path.stem}, member {row.name!r}: expected an array with one dimension, got shape {shape}")
    return shape[0]


def _counted(directory: Path, manifest: Manifest, num_named: int) -> Manifest:
    """Complete a manifest with the counts of its shards and sources; unnamed sources are listed only as far as they occur."""
    # Read and count every row.
    source_counts = SourceCounts()
    with closing(ShardReader(directory, manifest)) as reader:
        shards = [
            shard.model_copy(
                update={
                    "tokens": sum(count_row(reader.read(index, row), manifest, source_counts) for row in range(shard.samples))
                }
            )
            for index, shard in enumerate(manifest.shards)
        ]

    # The sources, as many as were named or occur.
    used = num_named or int(np.flatnonzero(source_counts.tokens).max(initial=-1)) + 1
    sources = [
        Source(name=source.name, documents=int(source_counts.documents[number]), tokens=int(source_counts.tokens[number]))
        for number, source in enumerate(manifest.sources[:used])
    ]
    return manifest.model_copy(update={"shards": tuple(shards), "sources": tuple(sources)})
