"""Packing shards from sorted runs of tokenised documents, each shard independently of the others.

The shuffled documents (`sorted_runs`) are one long sequence of tokens. Shard s of N rows of T tokens covers the positions

    [s · N · T, (s + 1) · N · T)

With `concat` it has exactly these tokens, so the shards together equal the whole sequence packed at once, whichever worker
makes which shard. With `best_fit` it has the documents that begin at these positions, so that it has about N rows, and no
document is cut at the end of a shard; a shard in which none begins (inside a very long document) is left out.

The record of a shard is written last. A shard that has a record is finished.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.corpus.packing import TokenizedDocuments, pack
from pipeline.data.corpus.sorted_runs import SortedRuns
from pipeline.data.corpus.workers import Report
from pipeline.data.shards.manifest import Shard
from pipeline.data.shards.writer import shard_name, token_dtype, write_shard
from pipeline.storage.whole_file import write_file


@dataclass(frozen=True)
class PackingSettings:
    """Settings of packing, as workers need them.

    sorted_runs: folder of the sorted runs. records: folder for the records of shards. directory: folder for the shards.
    num_sources: 0 if sources have no names.
    key_prefix: of the samples' keys, different for each part of an input.
    """

    sorted_runs: Path
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
        """Positions of the token sequence that a shard covers; with `best_fit` a shard has some tokens more or less."""
        return self.samples_per_shard * self.sequence_length


class ShardRecord(BaseModel):
    """Record of a finished shard. Documents are counted in the shard in which they begin.

    shard: its entry in the manifest; None if the shard is left out.
    num_documents, documents_cut: documents, and those of them that lie in more than one row.
    documents, tokens: by source; empty if sources have no names.
    """

    model_config = ConfigDict(frozen=True)

    shard: Shard | None
    num_documents: int
    documents_cut: int
    documents: list[int]
    tokens: list[int]


PackingTask = tuple[PackingSettings, np.ndarray, int]
"""Settings, `SortedRuns.tokens_before_bucket`, and the number of the shard."""


def packing_tasks(settings: PackingSettings) -> list[PackingTask]:
    """List the tasks, one for each shard; none if there are no documents."""
    before = SortedRuns(settings.sorted_runs, token_dtype(settings.vocab_size)).tokens_before_bucket()
    return [(settings, before, index) for index in range(-(-int(before[-1]) // settings.tokens_per_shard))]


def pack_shard(work: PackingTask, report: Report) -> ShardRecord:
    """Make one shard, unless it has a record already."""
    settings, before, index = work
    path = settings.records / f"{shard_name(index)}.json"
    record = _read_record(path)
    if record is None:
        record = _pack(settings, before, index)
        write_file(path, record.model_dump_json().encode())
    report(0, record.shard.tokens if record.shard else 0, record.shard.bytes if record.shard else 0)
    return record


def _read_record(path: Path) -> ShardRecord | None:
    """Read a shard's record; None if there is none, or it is damaged: the shard is made again."""
    try:
        return ShardRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _pack(settings: PackingSettings, before: np.ndarray, index: int) -> ShardRecord:
    # The documents of the shard and its neighbourhood, and those that begin in the shard.
    documents, begin = _documents_from(settings, before, index)
    first = index * settings.tokens_per_shard
    last = first + settings.tokens_per_shard
    begins_here = (begin >= first) & (begin < last)
    own = documents.select(begins_here)

    # By the packing rule: the documents to pack, those that are cut, and the number of the first row's key.
    if settings.packing == "concat":
        last_token = begin + documents.lengths - 1
        is_cut = begin // settings.sequence_length != last_token // settings.sequence_length
        packed = _between(documents, begin, first, last)
        first_key = index * settings.samples_per_shard
    else:
        is_cut = documents.lengths > settings.sequence_length
        packed = own
        # Keys must differ between shards, however long a shard's last document is. No two rows of best_fit would fit into one,
        # so any two have more than T tokens together, and a shard with n tokens has fewer than 2n/T + 1 rows. Twice the row
        # number of its first document, plus 2 for every shard before, leaves room for as many.
        first_key = 2 * (int(begin[begins_here].min(initial=last)) // settings.sequence_length + index)

    return ShardRecord(
        shard=_write(settings, index, packed, first_key) if len(packed.lengths) else None,
        num_documents=len(own.lengths),
        documents_cut=int((is_cut & begins_here).sum()),
        documents=np.bincount(own.sources, minlength=settings.num_sources).tolist(),
        tokens=np.bincount(own.sources, own.lengths, settings.num_sources).astype(np.int64).tolist(),
    )


def _write(settings: PackingSettings, index: int, documents: TokenizedDocuments, first_key: int) -> Shard:
    rows = pack(documents, settings.sequence_length, padding_id=settings.end_of_document_id, packing=settings.packing)
    return write_shard(
        ((f"{settings.key_prefix}{number:09d}", row) for number, row in enumerate(rows, first_key)),
        settings.directory,
        shard_name(index),
        vocab_size=settings.vocab_size,
        named_sources=settings.num_sources > 0,
    )


def _documents_from(settings: PackingSettings, before: np.ndarray, index: int) -> tuple[TokenizedDocuments, np.ndarray]:
    """Read the buckets that overlap the shard. Returns their documents, some of which lie before or after the shard, and the
    position of each document in the whole sequence, int64 [D]."""
    start = index * settings.tokens_per_shard
    first = int(np.searchsorted(before, start, side="right")) - 1
    last = int(np.searchsorted(before, start + settings.tokens_per_shard))
    sorted_runs = SortedRuns(settings.sorted_runs, token_dtype(settings.vocab_size))
    documents = sorted_runs.documents_in_buckets(first, min(last, len(before) - 1))
    return documents, before[first] + np.cumsum(documents.lengths) - documents.lengths


def _between(documents: TokenizedDocuments, begin: np.ndarray, first: int, last: int) -> TokenizedDocuments:
    """Cut documents to the positions [first, last) of the whole sequence, and drop those outside it."""
    skipped = np.maximum(first - begin, 0)
    lengths = np.minimum(begin + documents.lengths, last) - begin - skipped
    cut = TokenizedDocuments(documents.tokens, documents.starts + skipped, lengths, documents.sources)
    return cut.select(lengths > 0)
