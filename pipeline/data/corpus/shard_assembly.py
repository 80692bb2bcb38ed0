"""Assembling: from runs of tokenised documents to packed shards, each by itself.

The shuffled documents (`sorted_runs`) are one long sequence of tokens. Shard s is made of the tokens from s · N · T on, N rows
of T tokens: with `concat` of exactly those, so that the rows are those of the whole sequence packed at once, whoever makes
which shard when; with `best_fit` of the documents that begin among them, so that it has about N rows and no document is cut
because a shard ends. Where a document is longer than a shard, the shards in which none begins do not exist.

A shard is done when its record is there, which is written last.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.data.corpus.packing import TokenizedDocuments, pack
from pipeline.data.corpus.sorted_runs import Runs
from pipeline.data.corpus.workers import Report
from pipeline.data.shards.manifest import Shard
from pipeline.data.shards.writer import shard_name, token_dtype, write_shard
from pipeline.storage.whole_file import write_file


@dataclass(frozen=True)
class Assembly:
    """What a worker needs to know to make any shard of `directory` from the runs in `runs`; records go to `records`."""

    runs: Path
    records: Path
    directory: Path
    sequence_length: int
    vocab_size: int
    end_of_document_id: int
    num_sources: int
    packing: str
    samples_per_shard: int
    key_prefix: str = ""

    @property
    def tokens_per_shard(self) -> int:
        """Of the sequence of tokens; with `best_fit` a shard's own are some more or less."""
        return self.samples_per_shard * self.sequence_length


class ShardRecord(BaseModel):
    """A shard, if any document fell to it, and what begins in it: documents, how many of them are cut, and by source, where
    sources have names, documents and tokens.
    """

    model_config = ConfigDict(frozen=True)

    shard: Shard | None
    num_documents: int
    documents_cut: int
    documents: list[int]
    tokens: list[int]


ShardWork = tuple[Assembly, np.ndarray, int]
"""What to assemble, the tokens before each bucket of the runs, and the number of the shard."""


def shards_to_assemble(assembly: Assembly) -> list[ShardWork]:
    """The work for every shard; none where there are no documents."""
    before = Runs(assembly.runs, token_dtype(assembly.vocab_size)).tokens_before_bucket()
    return [(assembly, before, index) for index in range(-(-int(before[-1]) // assembly.tokens_per_shard))]


def assemble_shard(work: ShardWork, report: Report) -> ShardRecord:
    """Make a shard, unless that has been done."""
    assembly, before, index = work
    path = assembly.records / f"{shard_name(index)}.json"
    record = ShardRecord.model_validate_json(path.read_bytes()) if path.exists() else None
    if record is None:
        record = _assemble(assembly, before, index)
        write_file(path, record.model_dump_json().encode())
    report(0, record.shard.tokens if record.shard else 0, record.shard.bytes if record.shard else 0)
    return record


def _assemble(assembly: Assembly, before: np.ndarray, index: int) -> ShardRecord:
    documents, begin = _documents_from(assembly, before, index)
    first = index * assembly.tokens_per_shard
    last = first + assembly.tokens_per_shard
    begins_here = (begin >= first) & (begin < last)
    own = documents.select(begins_here)
    if assembly.packing == "concat":
        last_token = begin + documents.lengths - 1
        is_cut = begin // assembly.sequence_length != last_token // assembly.sequence_length
        packed = _between(documents, begin, first, last)
        first_key = index * assembly.samples_per_shard
    else:
        is_cut = documents.lengths > assembly.sequence_length
        packed = own
        # No two rows of best_fit could be one, so a shard has fewer rows than two for every T tokens up to where the next
        # begins, and one: no two shards have a key in common, however long its last document is.
        first_key = 2 * (int(begin[begins_here].min(initial=last)) // assembly.sequence_length + index)
    return ShardRecord(
        shard=_write(assembly, index, packed, first_key) if len(packed.lengths) else None,
        num_documents=len(own.lengths),
        documents_cut=int((is_cut & begins_here).sum()),
        documents=np.bincount(own.sources, minlength=assembly.num_sources).tolist(),
        tokens=np.bincount(own.sources, own.lengths, assembly.num_sources).astype(np.int64).tolist(),
    )


def _write(assembly: Assembly, index: int, documents: TokenizedDocuments, first_key: int) -> Shard:
    rows = pack(documents, assembly.sequence_length, padding_id=assembly.end_of_document_id, packing=assembly.packing)
    return write_shard(
        ((f"{assembly.key_prefix}{number:09d}", row) for number, row in enumerate(rows, first_key)),
        assembly.directory,
        shard_name(index),
        vocab_size=assembly.vocab_size,
        named_sources=assembly.num_sources > 0,
    )


def _documents_from(assembly: Assembly, before: np.ndarray, index: int) -> tuple[TokenizedDocuments, np.ndarray]:
    """All documents of the shard, some before it and some after it, and where in the whole sequence each begins."""
    start = index * assembly.tokens_per_shard
    first = int(np.searchsorted(before, start, side="right")) - 1
    last = int(np.searchsorted(before, start + assembly.tokens_per_shard))
    runs = Runs(assembly.runs, token_dtype(assembly.vocab_size))
    documents = runs.documents_in_buckets(first, min(last, len(before) - 1))
    return documents, before[first] + np.cumsum(documents.lengths) - documents.lengths


def _between(documents: TokenizedDocuments, begin: np.ndarray, first: int, last: int) -> TokenizedDocuments:
    """The documents' tokens from position `first` to `last` of the whole sequence, with the pieces at both ends."""
    skipped = np.maximum(first - begin, 0)
    lengths = np.minimum(begin + documents.lengths, last) - begin - skipped
    cut = TokenizedDocuments(documents.tokens, documents.starts + skipped, lengths, documents.sources)
    return cut.select(lengths > 0)
