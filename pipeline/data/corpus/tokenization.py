"""Tokenising: from documents to runs of ids, one slice of the input at a time.

A document's text becomes ids with the end-of-document token last. It goes to the held-out split or to the training one by
the hash of its text alone, so that copies of it go the same way; it is held out once, and taken for training as often as its
source's weight says: a weight of 2.3 takes each twice, and three in ten once more, by a hash of seed and place.

`tokenize_slice` is what workers run. A slice is done when its record is there, which is written last; what a killed worker left
of a slice is written over.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.corpus.documents import Counts, Document, DocumentReader, Rules
from pipeline.data.corpus.inputs import Span
from pipeline.data.corpus.sorted_runs import RunWriter
from pipeline.data.corpus.workers import Report
from pipeline.data.permutation import COPIES, DOCUMENTS, sort_keys
from pipeline.data.shards.writer import token_dtype
from pipeline.data.tokenizer import for_documents, load_tokenizer, vocab_size
from pipeline.storage.whole_file import write_file

# Given to the tokenizer at once: enough to keep all cores busy where one process has them all, little enough to hold.
_BATCH_CHARACTERS = 2_000_000

_making_encoder = Lock()


@dataclass(frozen=True)
class Tokenization:
    """What a worker needs to know to tokenise slices into `directory`."""

    directory: Path
    tokenizer_file: Path
    tokenizer_sha256: str
    end_of_document_id: int
    rules: Rules
    seed: int
    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    validation_fraction: float


@dataclass(frozen=True)
class SliceRecord:
    """What a slice was found to hold, and how many tokens it gave each split."""

    counts: Counts
    train_tokens: int
    validation_tokens: int


class Encoder:
    """Turns texts into ids, uint16 or uint32 by the size of the vocabulary, with the end-of-document token last."""

    def __init__(self, tokenizer: Tokenizer, end_of_document_id: int) -> None:
        self.dtype = token_dtype(vocab_size(tokenizer))
        self._end = [end_of_document_id]
        self._tokenizer = for_documents(tokenizer)

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The ids of each text, in order."""
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids + self._end, self.dtype)

    def batches(self, documents: Iterable[Document]) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
        """Documents a batch at a time, and the ids of each."""
        batch: list[Document] = []
        characters = 0
        for document in documents:
            batch.append(document)
            characters += len(document.text)
            if characters >= _BATCH_CHARACTERS:
                yield batch, list(self.encode([document.text for document in batch]))
                batch, characters = [], 0
        if batch:
            yield batch, list(self.encode([document.text for document in batch]))


def tokenize_slice(work: tuple[Tokenization, int, Sequence[Span]], report: Report) -> None:
    """Tokenise slice number `number` of the input, unless that has been done."""
    settings, number, spans = work
    name = f"slice-{number:06d}"
    if read_record(settings.directory, number) is not None:
        report(0, 0, sum(span.size for span in spans))
        return
    encoder = shared_encoder(settings)
    reader = DocumentReader(settings.rules)
    train, validation = (RunWriter(settings.directory / split, name, encoder.dtype) for split in ("train", "validation"))
    consumed = 0
    for documents, ids in encoder.batches(reader.read(spans)):
        add_documents(documents, ids, settings, train, validation)
        report(len(documents), sum(map(len, ids)), reader.consumed - consumed)
        consumed = reader.consumed
    train.close()
    validation.close()
    report(0, 0, sum(span.size for span in spans) - consumed)
    record = SliceRecord(reader.counts, train.num_tokens, validation.num_tokens)
    write_file(_record_file(settings.directory, number), json.dumps(asdict(record)).encode())


def add_documents(
    documents: Sequence[Document],
    ids: Sequence[np.ndarray],
    settings: Tokenization,
    train: RunWriter,
    validation: RunWriter,
) -> None:
    """Put a batch of tokenised documents into the runs of the split they belong to."""
    source_index = {name: index for index, name in enumerate(settings.source_names or [""])}
    tokenized = zip(documents, ids, strict=True)
    for (file, name), in_file in itertools.groupby(tokenized, key=lambda entry: (entry[0].file, entry[0].source)):
        stretch = list(in_file)
        source = source_index[name]
        positions = np.array([document.position for document, _ in stretch], np.uint64)
        held_out = np.array([is_held_out(document.text, settings.validation_fraction) for document, _ in stretch])
        for chosen, keys in _copies(positions, file, settings.seed, settings.weights[source]):
            for index, key in zip(chosen[~held_out[chosen]].tolist(), keys[~held_out[chosen]].tolist(), strict=True):
                train.add(key, stretch[index][1], source)
        keys = document_keys(positions, settings.seed, file)
        for index in np.flatnonzero(held_out).tolist():
            validation.add(int(keys[index]), stretch[index][1], source)


def document_keys(positions: np.ndarray, seed: int, file: int, copy: int = 0) -> np.ndarray:
    """The keys by which documents are shuffled, uint64 [n]; other copies of a document have other keys."""
    return sort_keys(positions, DOCUMENTS, seed, file, *([copy] if copy else []))


def _copies(positions: np.ndarray, file: int, seed: int, weight: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which of the documents are taken, and their keys: once for each whole number in the weight, then for its fraction."""
    whole = int(weight)
    for copy in range(whole):
        yield np.arange(len(positions)), document_keys(positions, seed, file, copy)
    if weight > whole:
        chance = sort_keys(positions, COPIES, seed, file) / 2.0**64
        chosen = np.flatnonzero(chance < weight - whole)
        yield chosen, document_keys(positions[chosen], seed, file, whole)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: by its text alone, so that copies of it go the same way."""
    return fraction > 0 and position_by_hash(text) < fraction


def position_by_hash(text: str) -> float:
    """A number in [0, 1) that belongs to the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


def read_record(directory: Path, number: int) -> SliceRecord | None:
    """What became of slice `number`; None if it is not done."""
    try:
        fields = json.loads(_record_file(directory, number).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return SliceRecord(**{**fields, "counts": Counts(**fields["counts"])})


def _record_file(directory: Path, number: int) -> Path:
    return directory / f"slice-{number:06d}.json"


def shared_encoder(settings: Tokenization) -> Encoder:
    """This process's encoder, one for all its workers."""
    # Threads that came at once would each make one.
    with _making_encoder:
        return _encoder_of(settings.tokenizer_file, settings.tokenizer_sha256, settings.end_of_document_id)


@lru_cache(maxsize=1)
def _encoder_of(tokenizer_file: Path, tokenizer_sha256: str, end_of_document_id: int) -> Encoder:
    # The hash is there to know another file of the same name.
    return Encoder(load_tokenizer(tokenizer_file), end_of_document_id)
