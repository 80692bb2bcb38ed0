"""Verification: check every byte of a prepared folder against its manifest.

Checks the sha256 and checksums of every shard, the checksum and contents of every sample (with the reader that feeds
training), and the counts: samples and tokens of each shard, documents and tokens of each source. Reports all problems, not
only the first.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import Manifest, Shard, read_manifest
from pipeline.data.shards.reader import DamagedSampleError, ShardReader
from pipeline.data.shards.sample import Sample
from pipeline.data.shards.shard_files import raise_machine_fault_as_data_error, size_problems
from pipeline.data.shards.table import INDEX_CHUNK_SAMPLES, crc32_of_chunks
from pipeline.data.shards.writer import MAX_SOURCES
from pipeline.data.tokenizer import fingerprint, identity, load_tokenizer, vocab_size
from pipeline.storage.lfs_pointer import pointer_problem

_CHUNK = 1 << 20
_MAX_SAMPLES_LISTED = 5


class SourceCounts:
    """Counts by source, int64 [MAX_SOURCES] each: tokens, and ends of documents. They stay 0 where sources have no names."""

    def __init__(self) -> None:
        self.tokens = np.zeros(MAX_SOURCES, np.int64)
        self.documents = np.zeros(MAX_SOURCES, np.int64)


def verify(directory: Path, report: Callable[[Shard], None] = lambda shard: None) -> list[str]:
    """Verify a prepared folder.

    Args:
        directory: the prepared folder.
        report: called after each shard, for progress.

    Returns:
        One sentence for each problem; empty if there is none.

    Raises:
        DataError: the manifest cannot be read, or the machine cannot read a file. The message lists the problems found before.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, check_files=False)
    problems = [*_tokenizer_problems(directory, manifest), *_unlisted_tars(directory, manifest)]

    # Every shard with all its samples. An error of the machine ends the verification.
    source_counts = SourceCounts()
    reader = ShardReader(directory, manifest)
    try:
        for index, shard in enumerate(manifest.shards):
            problems += _shard_problems(directory, manifest, index, reader, source_counts)
            report(shard)
    except (DataError, OSError) as error:
        found = [f"found before that: {problem}" for problem in problems]
        raise DataError("\n".join([_fault(error, directory), *found])) from None
    reader.close()

    # Counts by source say nothing if samples are damaged.
    return problems if problems else list(_source_problems(manifest, source_counts))


def _fault(error: DataError | OSError, directory: Path) -> str:
    if isinstance(error, OSError):
        try:
            raise_machine_fault_as_data_error(error, directory)
        except DataError as fault:
            return str(fault)
    return str(error)


def _shard_problems(
    directory: Path, manifest: Manifest, index: int, reader: ShardReader, source_counts: SourceCounts
) -> Iterator[str]:
    shard = manifest.shards[index]

    # The files as a whole.
    yield from size_problems(directory, shard)
    if any(pointer_problem(directory / f"{shard.name}.{suffix}") for suffix in ("tar", "tar.idx", "tar.crc32")):
        return
    if not all((directory / f"{shard.name}.{suffix}").is_file() for suffix in ("tar", "tar.idx", "tar.crc32")):
        return
    found = file_sha256(directory / f"{shard.name}.tar")
    if found != shard.sha256:
        yield f"shard {shard.name}: the sha256 of its tar is {found[:12]}…, expected {shard.sha256[:12]}…"

    # The checksums, by chunks: those of another shard would declare all samples to be damaged.
    mismatched = _mismatched_chunks(shard, (directory / f"{shard.name}.tar.crc32").read_bytes())
    if mismatched:
        yield (
            f"shard {shard.name}: its .crc32 is not the one that the manifest means, at samples "
            f"{', '.join(f'{chunk[0]:,} to {chunk[-1]:,}' for chunk in mismatched)}: the file is damaged, or the shard was "
            "exchanged for another"
        )

    # The samples.
    tokens, damaged = 0, []
    for sample in range(shard.samples):
        if any(sample in chunk for chunk in mismatched):
            continue
        try:
            tokens += count_row(reader.read(index, sample), manifest, source_counts)
        except DamagedSampleError as error:
            damaged.append(str(error))
    yield from damaged[:_MAX_SAMPLES_LISTED]
    if len(damaged) > _MAX_SAMPLES_LISTED:
        yield f"shard {shard.name}: {len(damaged) - _MAX_SAMPLES_LISTED:,} samples more are damaged"
    if not damaged and not mismatched and tokens != shard.tokens:
        yield f"shard {shard.name}: it has {tokens:,} tokens, expected {shard.tokens:,}"


def _mismatched_chunks(shard: Shard, checksums: bytes) -> list[range]:
    """Compare a shard's `.crc32` with the manifest; returns the samples of each chunk that differs."""
    found, expected = crc32_of_chunks(checksums), shard.crc32 or ""
    starts = range(0, len(expected), 8)
    wrong = (number for number, at in enumerate(starts) if found[at : at + 8] != expected[at : at + 8])
    return [range(n * INDEX_CHUNK_SAMPLES, min((n + 1) * INDEX_CHUNK_SAMPLES, shard.samples)) for n in wrong]


def count_row(row: Sample, manifest: Manifest, source_counts: SourceCounts) -> int:
    """Add a row's documents and tokens to the counts of their sources; returns the number of its tokens."""
    lengths = row.lengths.astype(np.int64)
    if row.sources is not None:
        # A document ends in this row if its last token is the end-of-document token.
        last = row.tokens[np.cumsum(lengths) - 1]
        source_counts.tokens += np.bincount(row.sources, lengths, MAX_SOURCES).astype(np.int64)
        source_counts.documents += np.bincount(row.sources[last == manifest.end_of_document_id], minlength=MAX_SOURCES)
    return int(lengths.sum())


def _source_problems(manifest: Manifest, source_counts: SourceCounts) -> Iterator[str]:
    for index, source in enumerate(manifest.sources):
        for kind, found in (("tokens", source_counts.tokens), ("documents", source_counts.documents)):
            expected = getattr(source, kind)
            if found[index] != expected:
                yield f"source {source.name}: the shards have {found[index]:,} of its {kind}, expected {expected:,}"


def _tokenizer_problems(directory: Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(directory / manifest.tokenizer_file)
    except DataError as error:
        yield str(error)
        return
    found = (fingerprint(tokenizer), identity(tokenizer), vocab_size(tokenizer))
    if found != (manifest.tokenizer_sha256, manifest.tokenizer_identity or found[1], manifest.vocab_size):
        yield f"{directory / manifest.tokenizer_file} is not the tokenizer that the manifest names; copy it again"


def _unlisted_tars(directory: Path, manifest: Manifest) -> Iterator[str]:
    listed = {f"{shard.name}.tar" for shard in manifest.shards}
    for path in sorted(directory.glob("*.tar")):
        if path.name not in listed:
            yield f"{path} is not in the manifest; remove it"


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            sha256.update(chunk)
    return sha256.hexdigest()
