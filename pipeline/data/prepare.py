"""Preparing: documents in, a folder of packed shards out, whole or not at all.

Documents are tokenised, ended with the end-of-document token, shuffled by the seed and packed. The same documents, seed and
tokenizer give the same bytes. Everything is written to `OUTPUT.partial` and renamed once, so that a folder named OUTPUT is
always complete; a `.partial` left by a killed run is removed.

The shuffle goes over all documents, so their ids are held in memory: 4 bytes a token.
"""

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.documents import Document
from pipeline.data.manifest import DataError, Manifest, Source, write_manifest
from pipeline.data.packing import pack
from pipeline.data.permutation import DOCUMENTS, permutation
from pipeline.data.shards import MAX_SOURCES, write_shards
from pipeline.data.tokenizer import TOKENIZER_FILE, end_of_document_id, fingerprint, for_documents, vocab_size

SAMPLES_PER_SHARD = 8192
# Tokenised at once, on all cores: enough to keep them busy, little enough to hold.
_CHUNK_CHARACTERS = 4_000_000


class TokenizedDocument(NamedTuple):
    """Ids with the end-of-document token last, uint32 [n], and the index of the source."""

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
) -> Manifest:
    """Tokenise, shuffle, pack and write documents.

    Args:
        documents: their `source` is one of `source_names`, or "" where there are none.
        output_dir: must not exist, or be empty.
        validation_fraction: of the documents, chosen by the hash of their text, goes to `output_dir/validation`, the others
            to `output_dir/train`; with 0 all go to `output_dir` itself.

    Returns:
        The manifest; with a validation split that of `output_dir/train`.

    Raises:
        DataError: the output exists, there are no documents (or none on one side of the split), or too many sources.
    """
    _check_sizes(sequence_length, samples_per_shard, validation_fraction, source_names)
    with whole_or_absent(output_dir) as directory:
        splits = _split(documents, tokenizer, source_names, validation_fraction)
        manifests = [
            write_dataset(
                tokenized,
                directory / name,
                tokenizer,
                sequence_length,
                seed=seed,
                source_names=source_names,
                samples_per_shard=samples_per_shard,
            )
            for name, tokenized in splits.items()
        ]
    return manifests[0]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: by its text alone, so that copies of it go the same way."""
    return position_by_hash(text) < fraction


def position_by_hash(text: str) -> float:
    """A number in [0, 1) that belongs to the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


@contextmanager
def whole_or_absent(output_dir: Path) -> Iterator[Path]:
    """A new folder `OUTPUT.partial` to write to, renamed to OUTPUT at the end of the block if nothing was raised.

    Raises:
        DataError: OUTPUT exists and is not an empty folder.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise DataError(f"the output {output_dir} exists already; remove it, or choose another one")
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.rename(partial, output_dir)


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, source_names: Sequence[str] = ()
) -> Iterator[TokenizedDocument]:
    """Tokenise documents, in their order, and end each with the end-of-document token."""
    end = np.array([end_of_document_id(tokenizer)], np.uint32)
    tokenizer = for_documents(tokenizer)
    source_index = {name: index for index, name in enumerate(source_names or [""])}
    for chunk in _chunks(documents):
        encodings = tokenizer.encode_batch_fast([document.text for document in chunk], add_special_tokens=False)
        for document, encoding in zip(chunk, encodings, strict=True):
            ids = np.concatenate([np.array(encoding.ids, np.uint32), end])
            yield TokenizedDocument(ids, source_index[document.source])


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
    """Shuffle and pack tokenised documents, and write shards, tokenizer and manifest into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    end = end_of_document_id(tokenizer)
    shuffled = (tokenized[index] for index in permutation(len(tokenized), DOCUMENTS, seed))
    shards = write_shards(
        pack(shuffled, sequence_length, padding_id=end),
        directory,
        vocab_size=vocab_size(tokenizer),
        samples_per_shard=samples_per_shard,
        named_sources=bool(source_names),
    )
    tokenizer.save(str(directory / TOKENIZER_FILE))
    manifest = Manifest(
        sequence_length=sequence_length,
        vocab_size=vocab_size(tokenizer),
        end_of_document_id=end,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=fingerprint(tokenizer),
        sources=_sources(tokenized, source_names),
        shards=tuple(shards),
    )
    write_manifest(directory, manifest)
    return manifest


def _check_sizes(sequence_length: int, samples_per_shard: int, validation_fraction: float, source_names: Sequence[str]) -> None:
    if sequence_length < 2:
        raise DataError(f"expected a sequence length of at least 2 tokens, got {sequence_length}")
    if samples_per_shard < 1:
        raise DataError(f"expected at least 1 sample a shard, got {samples_per_shard}")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"expected a validation fraction of at least 0 and below 1, got {validation_fraction}")
    if len(source_names) > MAX_SOURCES:
        raise DataError(f"expected at most {MAX_SOURCES} named sources, got {len(source_names)}")


def _split(
    documents: Iterable[Document], tokenizer: Tokenizer, source_names: Sequence[str], validation_fraction: float
) -> dict[str, list[TokenizedDocument]]:
    """The tokenised documents by the subfolder they go to."""
    names = ["train", "validation"] if validation_fraction else ["."]
    splits: dict[str, list[TokenizedDocument]] = {name: [] for name in names}
    documents, originals = itertools.tee(documents)
    for tokenized, original in zip(tokenize(documents, tokenizer, source_names), originals, strict=True):
        splits[names[is_held_out(original.text, validation_fraction)]].append(tokenized)
    empty = [name for name, tokenized in splits.items() if not tokenized]
    if empty:
        which = "" if empty == ["."] else f" for the {empty[0]} split"
        raise DataError(f"no documents with text{which}; give more input" + (" or another fraction" if which else ""))
    return splits


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _sources(tokenized: Sequence[TokenizedDocument], source_names: Sequence[str]) -> tuple[Source, ...]:
    documents, tokens = [0] * len(source_names), [0] * len(source_names)
    if source_names:
        for ids, source in tokenized:
            documents[source] += 1
            tokens[source] += len(ids)
    return tuple(Source(name=name, documents=documents[index], tokens=tokens[index]) for index, name in enumerate(source_names))
