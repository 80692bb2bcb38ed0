"""Prepared folders of numbered rows: row n has the tokens 10n, 10n + 1, …, so that what arrives says where it lay."""

from pathlib import Path

import numpy as np

from pipeline.data.shards.manifest import Manifest, Source, write_manifest
from pipeline.data.shards.writer import Row, write_shards


def numbered_data(
    directory: Path,
    num_samples: int,
    *,
    samples_per_shard: int = 11,
    sequence_length: int = 4,
    vocab_size: int = 60_000,
    sources: tuple[str, ...] = ("even", "odd"),
    first: int = 0,
) -> Path:
    """Rows `first` to `first + num_samples`, each of one document of T - 1 tokens; sources take turns."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [numbered_row(number, sequence_length, len(sources) or 1) for number in range(first, first + num_samples)]
    shards = write_shards(
        rows, directory, vocab_size=vocab_size, samples_per_shard=samples_per_shard, named_sources=bool(sources)
    )
    manifest = Manifest(
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        sources=tuple(Source(name=name, documents=1, tokens=1) for name in sources),
        shards=tuple(shards),
    )
    write_manifest(directory, manifest)
    (directory / "tokenizer.json").touch()
    return directory


def numbered_row(number: int, sequence_length: int, num_sources: int) -> Row:
    tokens = 10 * number + np.arange(sequence_length, dtype=np.uint32)
    return Row(tokens, np.array([sequence_length - 1], np.uint32), np.array([number % num_sources], np.uint8))
