"""The built-in corpus of the demo: text that every Python installation contains, and noise. It needs no network.

*library* is the language reference of `pydoc_data.topics` and a sample, by hash, of the standard library's source files: real
text with much to learn. *noise* is library text with its words shuffled, and random bytes in base64. Nothing but frequencies
can be learned from noise, so its loss stays high for policy and reference alike, and a selection by excess loss should leave
it out. The demo shows that it does.

`prepare_builtin` makes three prepared folders with one BPE, which is trained on the library's training documents alone:

    mix          library and noise; exactly a third of the tokens is noise
    library      the same library documents without noise, for the reference
    validation   library documents that are in neither of them

The text is that of the running Python. The same version gives the same bytes, another version another corpus.
"""

import base64
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import TokenizedDocument, tokenize, write_dataset
from pipeline.data.corpus.tokenization import position_by_hash
from pipeline.data.errors import DataError
from pipeline.data.permutation import WORDS, permutation
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.output_folder import atomic_folder
from pipeline.data.tokenizer import train_bpe
from pipeline.storage.whole_file import write_file

CORPUS_FILE = "corpus.json"
"""The settings of the corpus. Written last, so that a corpus that has this file is complete."""
LIBRARY, NOISE = "library", "noise"
FOLDERS = ("mix", "library", "validation")
VOCAB_SIZE = 4096
"""Vocabulary of the BPE, in tokens."""

# Tests and third-party packages do not belong to the library, and encodings/ has only tables of characters.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
# About 0.8M tokens to train on and 60k held out, at 3.6 characters a token.
_TRAINING_CHARACTERS = 2_900_000
_VALIDATION_CHARACTERS = 190_000
# Only short documents are held out, in characters, so that the validation set has many of them.
_VALIDATION_LONGEST = 20_000
_SAMPLES_PER_SHARD = 2048
_NOISE_WORDS = 300
_NOISE_BYTES = 750


def standard_library_documents() -> Iterator[Document]:
    """Yield the topics of `pydoc`, then the standard library's source files, each sorted by name."""
    yield from (Document(text, LIBRARY) for text in _topics())
    yield from (Document(text, LIBRARY) for text in _source_files())


def prepare_builtin(
    directory: Path,
    sequence_length: int,
    seed: int,
    vocab_size: int = VOCAB_SIZE,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Make `directory/mix`, `directory/library` and `directory/validation`, unless they exist already.

    Args:
        directory: the output.
        sequence_length: T, tokens of a row.
        seed: of the noise and of the shuffle.
        vocab_size: of the BPE.
        progress: called with a message at each phase.

    Raises:
        DataError: `directory` contains other files or a corpus of other settings, or this Python has too little text.
    """
    directory = Path(directory)
    requested = {"sequence_length": sequence_length, "vocab_size": vocab_size, "seed": seed}
    if directory.exists() and any(directory.iterdir()):
        _check_existing(directory, requested)
        return
    report = progress or (lambda message: None)

    # The library, split, and a BPE of its training documents.
    training, validation = _split(list(standard_library_documents()))
    report(f"training a BPE of {vocab_size} tokens on {len(training)} documents of the standard library")
    tokenizer = train_bpe((document.text for document in training), vocab_size)

    # All token ids: half as many tokens of noise as of library text make a third of the mix.
    report("tokenising and adding noise")
    library = list(tokenize(training, tokenizer, [LIBRARY]))
    noise = _tokenized_noise(training, seed, tokenizer, num_tokens=sum(len(ids) for ids, _ in library) // 2)
    held_out = list(tokenize(validation, tokenizer, [LIBRARY]))
    contents = {"mix": (library + noise, [LIBRARY, NOISE]), "library": (library, [LIBRARY])}
    contents["validation"] = (held_out, [LIBRARY])

    # The three folders, published together.
    with atomic_folder(directory) as partial:
        for name in FOLDERS:
            tokenized, names = contents[name]
            report(f"writing {name}: {sum(len(ids) for ids, _ in tokenized):,} tokens")
            write_dataset(
                tokenized,
                partial / name,
                tokenizer,
                sequence_length,
                seed=seed,
                source_names=names,
                samples_per_shard=_SAMPLES_PER_SHARD,
            )
        write_file(partial / CORPUS_FILE, (json.dumps(requested) + "\n").encode())


def _check_existing(directory: Path, requested: dict[str, int]) -> None:
    remedy = f"remove {directory}, or choose another run directory"
    try:
        existing = dict(json.loads((directory / CORPUS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise DataError(f"expected the built-in corpus in {directory}, but it has no {CORPUS_FILE}; {remedy}") from None
    differing = [key for key, value in requested.items() if existing.get(key) != value]
    if differing:
        listed = ", ".join(f"{key} {existing.get(key)} (expected {requested[key]})" for key in differing)
        raise DataError(f"the built-in corpus in {directory} was made with {listed}; {remedy}")
    for name in FOLDERS:
        read_manifest(directory / name)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the source files alone are enough
        return []
    # Without duplicates: some topics have the same text under two names.
    return list(dict.fromkeys(topics[name] for name in sorted(topics) if topics[name].strip()))


def _source_files() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield text


def _split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Sample training and validation documents by hash of their text; no text is in both."""
    # Validation: short texts, in the order of their hashes.
    by_hash = sorted({document.text for document in documents}, key=lambda text: (position_by_hash(text), text))
    short = (text for text in by_hash if len(text) <= _VALIDATION_LONGEST)
    validation = _take_characters(short, _VALIDATION_CHARACTERS)

    # Training: all topics, then source files in the order of their hashes.
    held_out = set(validation)
    topics = [text for text in _topics() if text not in held_out]
    used = held_out.union(topics)
    others = (text for text in by_hash if text not in used)
    training = topics + _take_characters(others, _TRAINING_CHARACTERS - sum(map(len, topics)))

    if sum(map(len, training)) < _TRAINING_CHARACTERS:
        raise DataError(
            f"the builtin corpus needs {_TRAINING_CHARACTERS:,} characters of the standard library's source and "
            f"documentation, but {sysconfig.get_path('stdlib')} has fewer: use a Python installed with its .py files, or "
            "prepare other text with launch/prepare.py"
        )
    return [Document(text, LIBRARY) for text in training], [Document(text, LIBRARY) for text in validation]


def _take_characters(texts: Iterator[str], num_characters: int) -> list[str]:
    taken, characters = [], 0
    while characters < num_characters and (text := next(texts, None)) is not None:
        taken.append(text)
        characters += len(text)
    return taken


def _tokenized_noise(library: Sequence[Document], seed: int, tokenizer: Tokenizer, num_tokens: int) -> list[TokenizedDocument]:
    """Tokenise noise documents with exactly `num_tokens` tokens in total; the last one is cut to fit."""
    documents = _noise_documents(library, seed)
    noise, remaining = [], num_tokens
    while remaining > 0:
        for ids, _ in tokenize(itertools.islice(documents, 64), tokenizer, [NOISE]):
            if remaining > 0:
                # A cut keeps the last id, so that the document still ends with its end-of-document token.
                ids = ids if len(ids) <= remaining else ids[[*range(remaining - 1), -1]]
                noise.append(TokenizedDocument(ids, 1))
                remaining -= len(ids)
    return noise


def _noise_documents(library: Sequence[Document], seed: int) -> Iterator[Document]:
    """Yield noise documents without end, alternately one of shuffled words and one of random bytes."""
    words = " ".join(document.text for document in library).split()
    order = permutation(len(words), WORDS, seed)
    for number in itertools.count():
        start = number * _NOISE_WORDS % len(words)
        yield Document(" ".join(words[index] for index in order[start : start + _NOISE_WORDS]), NOISE)
        # From shake_256, because the methods of `random` may change from one Python version to the next.
        random_bytes = hashlib.shake_256(f"{seed} {number}".encode()).digest(_NOISE_BYTES)
        yield Document(base64.encodebytes(random_bytes).decode("ascii"), NOISE)
