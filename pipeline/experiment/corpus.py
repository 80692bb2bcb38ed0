"""Real text and labelled noise, as prepared shards, with the truth of every token.

Two real sources ship with Python: `manual`, the topics of `pydoc`, and `code`, the standard library's source files. Noise is
made of their token ids, after tokenisation, so that each token's truth is exact:

    shuffled     a document's tokens in another order
    random       ids drawn evenly from the vocabulary
    boilerplate  one passage, again and again
    corrupted    a document of which a share of the tokens is replaced by others; what is not replaced is clean

Rows are packed here rather than by `corpus.prepare`, because the truth is packed along with the ids. Beside the prepared folder
lie, for its rows, KIND_FILE (uint8 [samples, T]: 0 clean, 1.. the kinds of noise, NO_TOKEN in padding) and DOCUMENT_FILE (int32
[samples, T], the number of the document).
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.corpus.builtin import standard_library_documents
from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import tokenize
from pipeline.data.corpus.tokenization import position_by_hash
from pipeline.data.permutation import DOCUMENTS, permutation, sort_keys
from pipeline.data.shards.manifest import Bos, Manifest, Source, write_manifest
from pipeline.data.shards.output_folder import atomic_folder
from pipeline.data.shards.writer import Row, write_shards
from pipeline.data.tokenizer import TOKENIZER_FILE, end_of_document_id, fingerprint, identity, train_bpe
from pipeline.storage.whole_file import write_file

CLEAN_SOURCES = ("manual", "code")
NOISE = ("shuffled", "random", "boilerplate", "corrupted")
SOURCES = (*CLEAN_SOURCES, *NOISE)
NO_TOKEN = 255
KIND_FILE, DOCUMENT_FILE = "kinds.npy", "documents.npy"
_SAMPLES_PER_SHARD = 2048
_LONGEST_HELD_OUT = 20_000
# In tokens: short documents of noise keep the kinds even.
_LONGEST_NOISE, _PASSAGE_TOKENS = 512, 64


class LabelledDocument(NamedTuple):
    """A document's ids, uint32 [n], the kind of each token, uint8 [n], and the index of its source."""

    ids: np.ndarray
    kinds: np.ndarray
    source: int


class Size(NamedTuple):
    """The size of the corpus, in characters of text: to train on, and held out of each source. noise: share of all tokens.
    replaced: share of a corrupted document's tokens."""

    characters: int
    held_out: int
    sequence_length: int
    vocab_size: int
    noise: float
    replaced: float
    seed: int


def write_corpus(directory: Path, size: Size) -> None:
    """Write `mix` (text and noise), `clean` (the same text alone) and `validation/SOURCE`; with the labels of mix."""
    training, held_out = _split(size)
    tokenizer = train_bpe([document.text for document in training], size.vocab_size)
    clean = list(_labelled(training, tokenizer))
    noise = list(_noise(clean, tokenizer, size))
    with atomic_folder(directory) as partial:
        write_rows([*clean, *noise], partial / "mix", tokenizer, size)
        write_rows(clean, partial / "clean", tokenizer, size)
        for name in CLEAN_SOURCES:
            of_source = [document for document in held_out if document.source == name]
            write_rows(list(_labelled(of_source, tokenizer)), partial / "validation" / name, tokenizer, size)


def write_rows(documents: Sequence[LabelledDocument], directory: Path, tokenizer: Tokenizer, size: Size) -> None:
    """Shuffle documents, cut them into rows of T tokens, and write these with their labels."""
    length = size.sequence_length
    order = permutation(len(documents), DOCUMENTS, size.seed).tolist()
    lengths = np.array([len(documents[number].ids) for number in order])
    number_of_token = np.repeat(np.array(order, np.int32), lengths)
    ids, kinds = (np.concatenate([documents[number][part] for number in order]) for part in (0, 1))
    directory.mkdir(parents=True)
    rows = list(_rows(ids, number_of_token, [document.source for document in documents], length))
    shards = write_shards(rows, directory, vocab_size=size.vocab_size, samples_per_shard=_SAMPLES_PER_SHARD, named_sources=True)

    for name, values, padding in ((KIND_FILE, kinds, NO_TOKEN), (DOCUMENT_FILE, number_of_token, -1)):
        padded = np.full(len(rows) * length, padding, values.dtype)
        padded[: len(values)] = values
        np.save(directory.parent / f"{directory.name}.{name}", padded.reshape(-1, length))

    write_file(directory / TOKENIZER_FILE, tokenizer.to_str().encode())
    sources = np.bincount([document.source for document in documents], minlength=len(SOURCES))
    tokens = np.bincount([documents[n].source for n in order], weights=lengths, minlength=len(SOURCES)).astype(int)
    manifest = Manifest(
        sequence_length=length,
        vocab_size=size.vocab_size,
        end_of_document_id=end_of_document_id(tokenizer),
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=fingerprint(tokenizer),
        tokenizer_identity=identity(tokenizer),
        bos=Bos(rule="never"),
        sources=tuple(
            Source(name=name, documents=int(sources[index]), tokens=int(tokens[index])) for index, name in enumerate(SOURCES)
        ),
        shards=tuple(shards),
    )
    write_manifest(directory, manifest)


def labels(data: Path, name: str) -> np.ndarray:
    """Read the labels of a prepared folder's rows: of KIND_FILE or DOCUMENT_FILE."""
    found: np.ndarray = np.load(data.parent / f"{data.name}.{name}", allow_pickle=False)
    return found


def _rows(ids: np.ndarray, documents: np.ndarray, sources: Sequence[int], length: int) -> Iterator[Row]:
    for start in range(0, len(ids), length):
        of_row = documents[start : start + length]
        # A document begins where the number changes.
        begins = np.flatnonzero(np.diff(of_row, prepend=-1))
        lengths = np.diff([*begins, len(of_row)]).astype(np.uint32)
        tokens = np.zeros(length, np.uint32)
        tokens[: len(of_row)] = ids[start : start + length]
        yield Row(tokens, lengths, np.array([sources[number] for number in of_row[begins]], np.uint8))


def _split(size: Size) -> tuple[list[Document], list[Document]]:
    """(documents to train on, documents held out), by the hashes of their texts; the first words tell topics from code."""
    found = list(standard_library_documents())
    topics = _topic_texts()
    by_hash = sorted({document.text for document in found}, key=lambda text: (position_by_hash(text), text))
    named = [Document(text, "manual" if text in topics else "code") for text in by_hash]
    held_out: list[Document] = []
    for name in CLEAN_SOURCES:
        short = [each for each in named if each.source == name and len(each.text) <= _LONGEST_HELD_OUT]
        held_out += _taken(short, size.held_out)
    texts = {document.text for document in held_out}
    return _taken([each for each in named if each.text not in texts], size.characters), held_out


def _topic_texts() -> set[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return set()
    return set(topics.values())


def _taken(documents: Sequence[Document], characters: int) -> list[Document]:
    taken, total = [], 0
    for document in documents:
        if total >= characters:
            break
        taken.append(document)
        total += len(document.text)
    return taken


def _labelled(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[LabelledDocument]:
    for ids, source in tokenize(documents, tokenizer, list(CLEAN_SOURCES)):
        yield LabelledDocument(ids.astype(np.uint32), np.zeros(len(ids), np.uint8), source)


def _noise(clean: Sequence[LabelledDocument], tokenizer: Tokenizer, size: Size) -> Iterator[LabelledDocument]:
    """Make documents of the four kinds, as many tokens of noise of each, until noise is its share of all tokens."""
    end, passage = end_of_document_id(tokenizer), clean[0].ids[:_PASSAGE_TOKENS]
    total, number = sum(len(document.ids) for document in clean), 0
    made = np.zeros(len(NOISE), np.int64)
    while made.sum() < size.noise * total:
        kind = int(made.argmin())
        of = clean[int(sort_keys(np.array([number], np.uint64), DOCUMENTS, size.seed)[0] % np.uint64(len(clean)))]
        body, is_noise = _noisy(NOISE[kind], of.ids[:-1][:_LONGEST_NOISE], passage, size, number)
        # The token that ends a document belongs to noise where all of it does.
        kinds = np.where(np.append(is_noise, is_noise.all()), kind + 1, 0).astype(np.uint8)
        yield LabelledDocument(np.append(body, end).astype(np.uint32), kinds, len(CLEAN_SOURCES) + kind)
        made[kind] += int((kinds > 0).sum())
        total += len(kinds)
        number += 1


def _noisy(kind: str, ids: np.ndarray, passage: np.ndarray, size: Size, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids of a document of this kind, bool which of them are noise)."""
    everything = np.ones(len(ids), bool)
    drawn = _drawn(len(ids), size.vocab_size, f"{size.seed} {number}")
    if kind == "shuffled":
        return ids[permutation(len(ids), DOCUMENTS, size.seed, number)], everything
    if kind == "random":
        return drawn, everything
    if kind == "boilerplate":
        return np.resize(passage, len(ids)), everything
    is_replaced = np.arange(len(ids)) < round(size.replaced * len(ids))
    is_replaced = is_replaced[permutation(len(ids), DOCUMENTS, size.seed, number)]
    # Another id than the one that was there.
    others = (ids + 1 + drawn % (size.vocab_size - 1)) % size.vocab_size
    return np.where(is_replaced, others, ids), is_replaced


def _drawn(number: int, vocab_size: int, seed: str) -> np.ndarray:
    """Ids drawn evenly, by shake_256, which no version of a library changes."""
    numbers = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * number), "<u8")
    return (numbers % np.uint64(vocab_size)).astype(np.uint32)
