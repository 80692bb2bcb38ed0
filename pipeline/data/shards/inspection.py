"""Inspection: describe a prepared folder by its counts, a histogram of document lengths, and some rows as text.

Packing cuts documents at the ends of rows. The lengths are those of the documents within rows, after cutting, in at most
`MAX_ROWS_COUNTED` rows spread evenly over the folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.shards.manifest import Manifest, read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.sample import Sample
from pipeline.data.shards.table import ShardTable
from pipeline.data.tokenizer import load_tokenizer

MAX_ROWS_COUNTED = 20_000
_BAR = 40


def inspect(directory: Path, num_rows: int = 2) -> Iterator[str]:
    """Yield lines that describe a prepared folder and show `num_rows` of its rows, decoded.

    Raises:
        DataError: the folder is incomplete, or a row that is read is damaged.
    """
    manifest = read_manifest(directory)
    reader = ShardReader(directory, manifest)
    yield from _summary(directory, manifest)
    yield ""
    yield from _histogram(reader, manifest)
    tokenizer = load_tokenizer(directory / manifest.tokenizer_file)
    for sample in _read(reader, manifest, _evenly_spaced(manifest.num_samples, num_rows)):
        yield ""
        yield from _row(sample, manifest, tokenizer)
    reader.close()


def _summary(directory: Path, manifest: Manifest) -> Iterator[str]:
    positions = manifest.num_samples * manifest.sequence_length
    padding = positions - manifest.num_tokens
    yield (
        f"{directory}: {manifest.num_tokens:,} tokens in {manifest.num_samples:,} rows of {manifest.sequence_length}, "
        f"{len(manifest.shards):,} shard(s), {ShardTable.of(manifest.shards).sizes.sum():,} bytes"
    )
    yield f"padding {padding:,} positions ({padding / positions:.3%}); vocabulary {manifest.vocab_size:,}"

    for source in manifest.sources:
        share = source.tokens / max(manifest.num_tokens, 1)
        yield f"source {source.name}: {source.documents:,} documents, {source.tokens:,} tokens ({share:.1%})"

    if preparation := manifest.preparation:
        cut = preparation.documents_cut / max(preparation.documents, 1)
        weights = "".join(f", weight of {name} {weight:g}" for name, weight in preparation.weights.items())
        yield (
            f"packing {preparation.packing}: {preparation.documents:,} documents, {cut:.2%} of them cut; "
            f"seed {preparation.seed}{weights}"
        )
        found = preparation.input
        yield (
            f"input: {found.documents:,} documents; left out: {found.empty:,} empty, {found.undecodable:,} undecodable, "
            f"{found.oversized:,} oversized, {found.ignored:,} other members of tars"
        )
        if found.special_text or found.without_token:
            yield (
                f"of the documents used {found.special_text:,} had the string of a special token in their text, and "
                f"{found.without_token:,} characters without a token"
            )
    yield f"documents end with id {manifest.end_of_document_id}, {_beginning(manifest)}"


def _beginning(manifest: Manifest) -> str:
    if manifest.bos is None:
        return "and it is not recorded if they begin with a BOS token"
    return "and begin without a BOS token" if manifest.bos.id is None else f"and begin with id {manifest.bos.id}"


def _histogram(reader: ShardReader, manifest: Manifest) -> Iterator[str]:
    rows = _evenly_spaced(manifest.num_samples, MAX_ROWS_COUNTED)
    lengths = np.concatenate([sample.lengths for sample in _read(reader, manifest, rows)])
    counts = np.bincount(np.floor(np.log2(lengths)).astype(int))
    yield f"lengths of documents within rows, {len(lengths):,} in {len(rows):,} rows:"
    for power, count in enumerate(counts.tolist()):
        span = f"{2**power:,} to {min(2 ** (power + 1) - 1, manifest.sequence_length):,}"
        yield f"{span:>20} {count:>10,} {'#' * round(_BAR * count / counts.max())}".rstrip()


def _row(sample: Sample, manifest: Manifest, tokenizer: Tokenizer) -> Iterator[str]:
    used = int(sample.lengths.sum())
    yield f"row {sample.key}: {len(sample.lengths)} document(s), {used} tokens, {len(sample.tokens) - used} of padding"
    start = 0
    for number, length in enumerate(sample.lengths.tolist()):
        ids = sample.tokens[start : start + length].tolist()
        start += length
        source = f" of {manifest.source_names[sample.sources[number]]}" if sample.sources is not None else ""
        end = "ends" if ids[-1] == manifest.end_of_document_id else "goes on elsewhere"
        # Escaped by repr, because the text may contain control sequences of a terminal.
        yield f"  document {number + 1}{source}, {length} tokens, {end}:"
        yield f"    {tokenizer.decode(ids, skip_special_tokens=False)!r}"


def _read(reader: ShardReader, manifest: Manifest, rows: Sequence[int]) -> Iterator[Sample]:
    """Read rows by their numbers, counted over all shards of the folder."""
    ends = np.cumsum(ShardTable.of(manifest.shards).samples)
    for row, shard in zip(rows, np.searchsorted(ends, rows, side="right").tolist(), strict=True):
        yield reader.read(shard, row - (int(ends[shard - 1]) if shard else 0))


def _evenly_spaced(count: int, num_wanted: int) -> list[int]:
    """Choose at most `wanted` numbers of range(count), evenly spaced."""
    num_wanted = min(count, num_wanted)
    return [number * count // num_wanted for number in range(num_wanted)]
