"""Preparing data: documents in, a folder of packed shards out.

`prepare` takes documents from anywhere, one by one, in this thread. `prepare_files` takes files, with many workers, and
resumes after a kill. Both tokenise documents into sorted runs of ids on disk (`tokenization`, `sorted_runs`). Every shard then
reads its range of the shuffled documents from them and packs it (`shard_assembly`). The same documents, seed and tokenizer give
the same bytes.

A folder is written under a temporary name and renamed at the end (`shards.output_folder`), so a folder that exists is complete.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.corpus.counts import Counts
from pipeline.data.corpus.documents import Document, Rules
from pipeline.data.corpus.encoding import Encoder
from pipeline.data.corpus.packing import PACKINGS
from pipeline.data.corpus.shard_assembly import PackingSettings, ShardRecord, pack_shard, packing_tasks
from pipeline.data.corpus.sorted_runs import SortedRunWriter
from pipeline.data.corpus.tokenization import TokenizationSettings, add_documents, encode_documents
from pipeline.data.corpus.workers import Report, work_on
from pipeline.data.errors import DataError
from pipeline.data.permutation import DOCUMENTS, sort_keys
from pipeline.data.shards.manifest import Bos, Manifest, Source, write_manifest
from pipeline.data.shards.output_folder import atomic_folder
from pipeline.data.shards.writer import MAX_SOURCES, token_dtype
from pipeline.data.tokenizer import TOKENIZER_FILE, end_of_document_id, fingerprint, identity, vocab_size

SAMPLES_PER_SHARD = 8192


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of a preparation.

    sequence_length: T, tokens of a row.
    seed: of the shuffle of documents.
    packing: one of `packing.PACKINGS`.
    samples_per_shard: rows of a shard (with best_fit about).
    validation_fraction: of the documents, chosen by the hash of their text, goes to a folder `validation`, the others to
        `train`; with 0 all go to the output itself.
    weights: how often the documents of a source are taken, by its name; 1 for a source that is not listed.
    part: (i, N) to prepare the i-th of N parts of the input, i from 1; None for all of it.
    end_of_document: the tokenizer's token that ends a document; None for one of the usual names.
    bos: the token before each document; None for none. bos_rule: how it was chosen, for the manifest.
    special: tokens that never come of a text, beside those that the tokenizer itself calls special.
    rules: of reading documents.
    """

    sequence_length: int
    seed: int = 0
    packing: str = "concat"
    samples_per_shard: int = SAMPLES_PER_SHARD
    validation_fraction: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    part: tuple[int, int] | None = None
    end_of_document: str | None = None
    bos: str | None = None
    bos_rule: str = "auto"
    special: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)

    @property
    def splits(self) -> dict[str, str]:
        """Folder of each split, relative to the output."""
        return {"train": "train", "validation": "validation"} if self.validation_fraction else {"train": "."}

    def check(self, source_names: Sequence[str]) -> None:
        """Check the ranges of all values.

        Raises:
            DataError: a value is out of its range.
        """
        for problem in self.problems(source_names):
            raise DataError(problem)

    def problems(self, source_names: Sequence[str]) -> Iterator[str]:
        """List the values that are out of their ranges, a sentence each."""
        if self.sequence_length < 2:
            yield f"expected a sequence length of at least 2 tokens, got {self.sequence_length}"
        if self.samples_per_shard < 1:
            yield f"expected at least 1 sample a shard, got {self.samples_per_shard}"
        if not 0 <= self.validation_fraction < 1:
            yield f"expected a validation fraction of at least 0 and below 1, got {self.validation_fraction}"
        if self.packing not in PACKINGS:
            yield f"expected a packing among {', '.join(PACKINGS)}, got {self.packing!r}"
        if self.rules.max_document_bytes < 1:
            yield f"expected at least 1 byte a document, got {self.rules.max_document_bytes}"
        if len(source_names) > MAX_SOURCES:
            yield f"expected at most {MAX_SOURCES} named sources, got {len(source_names)}"


class TokenizedDocument(NamedTuple):
    """A document as ids [n], the last of which is the end-of-document token, and the index of its source."""

    ids: np.ndarray
    source: int


def prepare(
    documents: Iterable[Document],
    output_dir: Path,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    seed: int,
    source_names: Sequence[str] = (),
    samples_per_shard: int = SAMPLES_PER_SHARD,
    validation_fraction: float = 0.0,
    packing: str = "concat",
) -> Manifest:
    """Tokenise, shuffle, pack and write documents.

    Args:
        documents: their `source` is one of `source_names`, or "" if there are none.
        output_dir: must not exist, or be empty.
        sequence_length: T.
        seed: of the shuffle.
        source_names: in the order of their indices.
        samples_per_shard: rows of a shard.
        validation_fraction: of the documents, chosen by the hash of their text, goes to `output_dir/validation`, the others
            to `output_dir/train`; with 0 all go to `output_dir` itself.
        packing: one of `packing.PACKINGS`.

    Returns:
        The manifest; with a validation split that of `output_dir/train`.

    Raises:
        DataError: the output exists, there are no documents (or none on one side of the split), or too many sources.
    """
    settings = PrepareSettings(sequence_length, seed, packing, samples_per_shard, validation_fraction)
    settings.check(source_names)
    numbered = (replace(document, file=0, position=number) for number, document in enumerate(documents))
    with atomic_folder(output_dir) as directory, tempfile.TemporaryDirectory(dir=directory) as work:
        # Tokenise into sorted runs.
        tokenization = tokenization_settings(Path(work), directory / TOKENIZER_FILE, tokenizer, settings, source_names)
        encoder = Encoder(tokenizer, end_of_document_id(tokenizer))
        writers = {split: SortedRunWriter(Path(work, split), "all", encoder.dtype) for split in ("train", "validation")}
        for batch, ids in encode_documents(encoder, numbered, Counts(), settings.rules.on_undecodable, _number):
            add_documents(batch, ids, tokenization, **writers)
        for writer in writers.values():
            writer.close()

        # Pack the sorted runs into shards.
        manifests = [
            _write_split(Path(work), split, directory / folder, tokenizer, settings, source_names)
            for split, folder in settings.splits.items()
        ]
    return manifests[0]


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, source_names: Sequence[str] = ()
) -> Iterator[TokenizedDocument]:
    """Tokenise documents, in order, and append the end-of-document token to each."""
    source_index = {name: index for index, name in enumerate(source_names or [""])}
    encoder = Encoder(tokenizer, end_of_document_id(tokenizer))
    for batch, ids in encode_documents(encoder, documents, Counts(), "error", _number):
        for document, tokens in zip(batch, ids, strict=True):
            yield TokenizedDocument(tokens, source_index[document.source])


def _number(document: Document) -> str:
    return f"document {document.position + 1:,}"


def write_dataset(
    tokenized: Sequence[TokenizedDocument],
    directory: Path,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    seed: int,
    source_names: Sequence[str],
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> Manifest:
    """Shuffle and pack tokenised documents, and write the shards, the tokenizer and the manifest into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = PrepareSettings(sequence_length, seed, samples_per_shard=samples_per_shard)
    keys = sort_keys(np.arange(len(tokenized), dtype=np.uint64), DOCUMENTS, seed).tolist()
    with tempfile.TemporaryDirectory(dir=directory) as work:
        writer = SortedRunWriter(Path(work, "train"), "all", token_dtype(vocab_size(tokenizer)))
        for key, (ids, source) in zip(keys, tokenized, strict=True):
            writer.add(key, ids, source)
        writer.close()
        return _write_split(Path(work), "train", directory, tokenizer, settings, source_names)


def tokenization_settings(
    work: Path, tokenizer_file: Path, tokenizer: Tokenizer, settings: PrepareSettings, source_names: Sequence[str]
) -> TokenizationSettings:
    """Collect what workers need to tokenise into sorted runs below `work`; they load the tokenizer from `tokenizer_file`."""
    return TokenizationSettings(
        directory=work,
        tokenizer_file=tokenizer_file,
        tokenizer_identity=identity(tokenizer),
        end_of_document_id=end_of_document_id(tokenizer, settings.end_of_document),
        bos_id=None if settings.bos is None else tokenizer.token_to_id(settings.bos),
        special=settings.special,
        rules=settings.rules,
        seed=settings.seed,
        source_names=tuple(source_names),
        weights=tuple(settings.weights.get(name, 1.0) for name in source_names or [""]),
        validation_fraction=settings.validation_fraction,
    )


def pack_split(
    work: Path,
    split: str,
    directory: Path,
    tokenizer: Tokenizer,
    settings: PrepareSettings,
    source_names: Sequence[str],
    *,
    processes: int = 1,
    report: Report = lambda documents, tokens, size: None,
) -> tuple[Manifest, list[ShardRecord]]:
    """Pack the sorted runs in `work/SPLIT` into shards in `directory`, and save the tokenizer there.

    Returns:
        The manifest, which the caller writes, and the record of every shard.

    Raises:
        DataError: there are no documents, and this is not one of several parts.
    """
    packing = PackingSettings(
        sorted_runs=work / split,
        records=work / f"{split}.records",
        directory=directory,
        sequence_length=settings.sequence_length,
        vocab_size=vocab_size(tokenizer),
        end_of_document_id=end_of_document_id(tokenizer, settings.end_of_document),
        num_sources=len(source_names),
        packing=settings.packing,
        samples_per_shard=settings.samples_per_shard,
        key_prefix=f"{settings.part[0]:04d}-" if settings.part else "",
    )

    # Pack the shards, in parallel.
    for folder in (directory, packing.records):
        folder.mkdir(parents=True, exist_ok=True)
    shards = packing_tasks(packing)
    if not shards and settings.part is None:
        which = f" for the {split} split" if settings.validation_fraction else ""
        raise DataError(f"no documents with text{which}; give more input" + (" or another fraction" if which else ""))
    records = list(work_on(pack_shard, shards, max(1, min(processes, len(shards))), report))

    # The tokenizer and the manifest.
    tokenizer.save(str(directory / TOKENIZER_FILE))
    manifest = Manifest(
        sequence_length=settings.sequence_length,
        vocab_size=packing.vocab_size,
        end_of_document_id=packing.end_of_document_id,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=fingerprint(tokenizer),
        tokenizer_identity=identity(tokenizer),
        bos=Bos(rule=settings.bos_rule, id=None if settings.bos is None else tokenizer.token_to_id(settings.bos)),
        sources=_sources(records, source_names),
        # Sorted by number: with more than 100,000 shards their names have different lengths.
        shards=tuple(sorted((r.shard for r in records if r.shard), key=lambda shard: (len(shard.name), shard.name))),
    )
    return manifest, records


def _write_split(
    work: Path, split: str, directory: Path, tokenizer: Tokenizer, settings: PrepareSettings, source_names: Sequence[str]
) -> Manifest:
    manifest, _ = pack_split(work, split, directory, tokenizer, settings, source_names)
    write_manifest(directory, manifest)
    return manifest


def _sources(records: Sequence[ShardRecord], source_names: Sequence[str]) -> tuple[Source, ...]:
    return tuple(
        Source(
            name=name,
            documents=sum(record.documents[index] for record in records),
            tokens=sum(record.tokens[index] for record in records),
        )
        for index, name in enumerate(source_names)
    )
