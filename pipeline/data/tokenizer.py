"""Tokenizers: a byte-level BPE trained here, the bytes of UTF-8, or any `tokenizer.json` of the `tokenizers` library.

A tokenizer is identified by its *fingerprint*, the sha256 of its map from id to token. Two files that differ only in the layout
of their JSON are the same tokenizer, and a model trained with one can use the other.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
BYTES = "bytes"

# Names of the end-of-document token in various model families, in the order in which they are tried.
_END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "</s>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek writes it with full-width bars)
    "<|im_end|>",
    "<eos>",
)
_NUM_BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose id 0 is END_OF_DOCUMENT; the same texts give the same tokenizer.

    With little text it may have fewer than `vocab_size` tokens, because there are no more pairs to merge.

    Raises:
        DataError: `vocab_size` has no room for the 256 bytes and END_OF_DOCUMENT.
    """
    if vocab_size <= _NUM_BYTES:
        raise DataError(f"expected a vocabulary of at least {_NUM_BYTES + 1} tokens for a byte-level BPE, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer whose ids 0 to 255 are the bytes of UTF-8; 256 is END_OF_DOCUMENT."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """Map the characters that represent bytes in a byte-level vocabulary to these bytes."""
    # Visible characters represent themselves; the other bytes are represented by the characters from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(_NUM_BYTES) if byte not in visible]
    code_points = {byte: byte for byte in visible} | {byte: _NUM_BYTES + number for number, byte in enumerate(others)}
    return {chr(character): byte for byte, character in code_points.items()}


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, or the one in a folder such as a Hugging Face model's.

    Raises:
        DataError: there is no such file, or the `tokenizers` library cannot read it.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"expected a tokenizer at {file}, but there is no such file; give a tokenizer.json or its folder")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from None


def for_documents(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer so that it encodes any text completely, and as plain text.

    A downloaded tokenizer may truncate or pad. It would also encode the string of END_OF_DOCUMENT inside a text as the special
    token, so that a text could end its own document.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def fingerprint(tokenizer: Tokenizer) -> str:
    """Compute the sha256, in hexadecimal, of the map from id to token."""
    tokens = sorted((token_id, token) for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode("ascii")).hexdigest()


def end_of_document_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """Find the id of the end-of-document token: `token`, or if that is None the first of the usual names.

    Raises:
        DataError: the tokenizer has no such token.
    """
    names = _END_OF_DOCUMENT_NAMES if token is None else (token,)
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise DataError(
        f"the tokenizer has no end-of-document token: expected one of {', '.join(names)}; name its own with "
        f"--end-of-document, or add {END_OF_DOCUMENT} to it"
    )


def declared_end_of_document(tokenizer: Tokenizer, directory: Path) -> str | None:
    """Read the `eos_token` of a Hugging Face model's folder; None if there is none, or the tokenizer has a usual name."""
    if any(tokenizer.token_to_id(name) is not None for name in _END_OF_DOCUMENT_NAMES):
        return None
    try:
        declared = json.loads((Path(directory) / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = declared.get("content") if isinstance(declared, dict) else declared
    return token if isinstance(token, str) else None


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return the vocabulary size that a model needs: the highest id + 1, gaps included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
