"""Tokenising: from documents to sorted runs of ids, one slice of the input at a time.

A document's text becomes ids (`encoding`), with the end-of-document token appended and, if asked for, the BOS token before
them. The hash of its text alone decides whether it belongs
to the validation or the training split, so that copies of a text go to the same split. A validation document is used once. A
training document is used as often as its source's weight says: with a weight of 2.3 every document twice, and three in ten,
chosen by a hash of the seed and of the document's position in the input, a third time.

Workers run `tokenize_slice`. The record of a slice is written last, so a slice that has a record is finished; the files of an
unfinished slice are overwritten.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from pipeline.data.corpus.contents import Contents
from pipeline.data.corpus.counts import Counts, Lines, Note
from pipeline.data.corpus.documents import Document, DocumentReader, Rules
from pipeline.data.corpus.encoding import Encoded, Encoder
from pipeline.data.corpus.inputs import DATASET, Span
from pipeline.data.corpus.sorted_runs import SortedRunWriter
from pipeline.data.corpus.workers import Report
from pipeline.data.errors import DataError
from pipeline.data.permutation import COPIES, DOCUMENTS, sort_keys
from pipeline.data.tokenizer import load_tokenizer
from pipeline.storage.whole_file import write_file

# Characters given to the tokenizer at once: enough for it to use all cores of one process, few enough to hold in memory.
_BATCH_CHARACTERS = 2_000_000

_encoder_lock = Lock()


@dataclass(frozen=True)
class TokenizationSettings:
    """Settings of tokenising, as workers need them.

    directory: folder for the sorted runs and records.
    tokenizer_file, tokenizer_identity: the tokenizer and its identity.
    bos_id: of the token before each document; None for none.
    special: tokens that are special although the tokenizer does not say so.
    rules: of reading documents.
    seed: of the shuffle.
    source_names: empty if sources have no names.
    weights: of each source, at least one.
    validation_fraction: of the documents, chosen by the hash of their text.
    """

    directory: Path
    tokenizer_file: Path
    tokenizer_identity: str
    end_of_document_id: int
    bos_id: int | None
    special: tuple[str, ...]
    rules: Rules
    seed: int
    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    validation_fraction: float


@dataclass(frozen=True)
class SliceRecord:
    """Record of a finished slice: the counts of its documents, and the tokens that it added to each split."""

    counts: Counts
    train_tokens: int
    validation_tokens: int
    # None in the work of an older version.
    contents: str | None = None


def encode_documents(
    encoder: Encoder, documents: Iterable[Document], counts: Counts, on_undecodable: str, where: Callable[[Document], str]
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Encode documents batch by batch, and count those with something to say about them.

    Args:
        encoder: makes the ids.
        documents: in order.
        counts: updated. Documents that are left out after all are no longer counted as used.
        on_undecodable: "skip" to leave out documents that the tokenizer cannot encode, "error" to stop.
        where: names a document for messages.

    Yields:
        The documents of a batch that are used, and the ids of each.

    Raises:
        DataError: the tokenizer cannot encode a document, and that is an error.
    """
    for batch in _batches(documents):
        used = []
        for document, encoded in zip(batch, encoder.encode([document.text for document in batch]), strict=True):
            if (ids := _accept(document, encoded, counts, on_undecodable, where)) is not None:
                used.append((document, ids))
        yield [document for document, _ in used], [ids for _, ids in used]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _accept(
    document: Document, encoded: Encoded, counts: Counts, on_undecodable: str, where: Callable[[Document], str]
) -> np.ndarray | None:
    """Count what is to be said of a document; returns its ids, or None if it is left out."""
    # The tokenizer cannot encode it.
    if encoded.ids is None:
        if on_undecodable == "error":
            raise DataError(
                f"{where(document)}: {encoded.problem}; mend the tokenizer or the text, or leave it out with "
                "--on-undecodable skip"
            )
        counts.documents -= 1
        counts.undecodable += 1
        counts.note(Note(where(document), encoded.problem))
        return None

    # No character of it has a token.
    if encoded.is_empty:
        counts.documents -= 1
        counts.empty += 1
        counts.note(Note(where(document), f"the tokenizer has no token for any of its {len(document.text):,} characters"))
        return None

    # It is used, but not quite as its author may think.
    if encoded.has_special_text:
        counts.special_text += 1
    if encoded.lost:
        counts.without_token += 1
        counts.warn(f"{where(document)}: the tokenizer has no token for {encoded.lost!r}")
    return encoded.ids


def tokenize_slice(work: tuple[TokenizationSettings, int, Sequence[Span]], report: Report) -> None:
    """Tokenise one slice of the input, unless it has a record already.

    Args:
        work: settings, number of the slice, and its spans.
        report: called with the documents, tokens and bytes since its last call.
    """
    # Finished already.
    settings, number, spans = work
    name = f"slice-{number:06d}"
    if read_record(settings.directory, number) is not None:
        report(0, 0, sum(span.size for span in spans))
        return

    # Read, encode and sort into runs.
    encoder = shared_encoder(settings)
    reader = DocumentReader(settings.rules, lambda: _lines_before(settings.directory, number))
    train, validation = (SortedRunWriter(settings.directory / split, name, encoder.dtype) for split in ("train", "validation"))
    consumed = 0
    named = _Names(spans)
    rule = settings.rules.on_undecodable
    contents = Contents()
    for documents, ids in encode_documents(encoder, contents.of(reader.read(spans)), reader.counts, rule, named.of):
        add_documents(documents, ids, settings, train, validation)
        report(len(documents), sum(map(len, ids)), reader.consumed - consumed)
        consumed = reader.consumed
    train.close()
    validation.close()
    report(0, 0, sum(span.size for span in spans) - consumed)

    # The record, last.
    record = SliceRecord(reader.counts, train.num_tokens, validation.num_tokens, str(contents))
    write_file(_record_file(settings.directory, number), json.dumps(asdict(record)).encode())


def _lines_before(directory: Path, number: int) -> Lines | None:
    """Count the lines just before slice `number`, as far as the slices before it are finished."""
    counts = Counts()
    for earlier in range(number):
        if (record := read_record(directory, earlier)) is not None:
            counts.add(record.counts)
    return counts.lines


class _Names:
    """Names of documents for messages, by the files of a slice."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = {span.file: span for span in spans}

    def of(self, document: Document) -> str:
        """Name a document by its file and its place there."""
        span = self._spans[document.file]
        if span.kind == ".txt":
            return span.path
        unit = "row" if span.kind in (".parquet", DATASET) else "byte"
        return f"{span.path}, document at {unit} {document.position:,}"


def add_documents(
    documents: Sequence[Document],
    ids: Sequence[np.ndarray],
    settings: TokenizationSettings,
    train: SortedRunWriter,
    validation: SortedRunWriter,
) -> None:
    """Add a batch of tokenised documents to the sorted runs of their splits, training documents by their weights."""
    # Neighbouring documents of one file and source together: their keys are hashed as one array.
    source_index = {name: index for index, name in enumerate(settings.source_names or [""])}
    tokenized = zip(documents, ids, strict=True)
    for (file, name), in_file in itertools.groupby(tokenized, key=lambda entry: (entry[0].file, entry[0].source)):
        group = list(in_file)
        source = source_index[name]
        positions = np.array([document.position for document, _ in group], np.uint64)

        # Training documents, every copy of them, then validation documents.
        held_out = np.array([is_held_out(document.text, settings.validation_fraction) for document, _ in group])
        for chosen, keys in _copies(positions, file, settings.seed, settings.weights[source]):
            for index, key in zip(chosen[~held_out[chosen]].tolist(), keys[~held_out[chosen]].tolist(), strict=True):
                train.add(key, group[index][1], source)
        keys = document_keys(positions, settings.seed, file)
        for index in np.flatnonzero(held_out).tolist():
            validation.add(int(keys[index]), group[index][1], source)


def document_keys(positions: np.ndarray, seed: int, file: int, copy: int = 0) -> np.ndarray:
    """Compute the keys by which documents are shuffled, uint64 [n]; the copies of a document have different keys."""
    return sort_keys(positions, DOCUMENTS, seed, file, *([copy] if copy else []))


def _copies(positions: np.ndarray, file: int, seed: int, weight: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Choose the documents of each copy. Yields indices and keys: all documents floor(weight) times, then a random sample, the
    fraction of the weight."""
    whole = int(weight)
    for copy in range(whole):
        yield np.arange(len(positions)), document_keys(positions, seed, file, copy)
    if weight > whole:
        uniform = sort_keys(positions, COPIES, seed, file) / 2.0**64
        chosen = np.flatnonzero(uniform < weight - whole)
        yield chosen, document_keys(positions[chosen], seed, file, whole)


def is_held_out(text: str, fraction: float) -> bool:
    """Check if a document belongs to the validation split; decided by its text alone, so that copies go to the same split."""
    return fraction > 0 and position_by_hash(text) < fraction


def position_by_hash(text: str) -> float:
    """Hash a text to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


def read_record(directory: Path, number: int) -> SliceRecord | None:
    """Read the record of slice `number`; None if it is not finished, or its record is damaged: it is made again."""
    try:
        fields = json.loads(_record_file(directory, number).read_text(encoding="utf-8"))
        return SliceRecord(**{**fields, "counts": Counts.from_json(fields["counts"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _record_file(directory: Path, number: int) -> Path:
    return directory / f"slice-{number:06d}.json"


def shared_encoder(settings: TokenizationSettings) -> Encoder:
    """Get the encoder of this process, shared by all its worker threads."""
    # Under a lock, because threads that call this at the same time would each make one.
    with _encoder_lock:
        return _encoder_of(
            settings.tokenizer_file,
            settings.tokenizer_identity,
            settings.end_of_document_id,
            settings.bos_id,
            settings.special,
        )


@lru_cache(maxsize=1)
def _encoder_of(
    tokenizer_file: Path, tokenizer_identity: str, end_of_document_id: int, bos_id: int | None, special: tuple[str, ...]
) -> Encoder:
    # The hash is part of the cache's key: the file may be replaced by another tokenizer.
    return Encoder(load_tokenizer(tokenizer_file), end_of_document_id, bos_id, special)
