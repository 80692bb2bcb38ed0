"""Tokenizers: a byte-level BPE trained here, the bytes of UTF-8, or any `tokenizer.json` of the `tokenizers` library.

A tokenizer has two hashes. Its *fingerprint* is the sha256 of its map from id to token: what an id means. Its *identity* is the
sha256 of all that decides which ids a text becomes: normaliser, pre-tokeniser, vocabulary, merges and added tokens. Two files
that differ only in the layout of their JSON are the same tokenizer by both. The token that may lie before the ids of a text is
recorded beside them (`special_tokens`).
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.errors import DataError
from pipeline.storage.lfs_pointer import pointer_problem

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
SENTENCEPIECE_FILE = "tokenizer.model"
_NAME_ONE = "give a tokenizer.json or its folder"


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
    """Load a tokenizer from any path that `find_tokenizer` takes.

    Raises:
        DataError: there is no such file, or the `tokenizers` library cannot read it.
    """
    file = find_tokenizer(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        problem = f"{file} is not a tokenizer that the tokenizers library can read: {error}"
        sentencepiece = _of_sentencepiece(file) if file.name == SENTENCEPIECE_FILE else None
        raise DataError(pointer_problem(file) or sentencepiece or problem) from None


def find_tokenizer(path: Path) -> Path:
    """Find the file of a tokenizer: a `tokenizer.json`, or that of a folder.

    A folder may be a Hugging Face model's, a prepared one, or a folder of prepared ones (train, validation), which must have
    the same tokenizer, and the same tokens around their documents.

    Raises:
        DataError: there is no such file, or there are several different ones.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if file.is_file():
        return file

    # Prepared folders within this one, as `launch/shards.py verify` takes them.
    found = sorted(manifest.with_name(TOKENIZER_FILE) for manifest in path.glob("*/manifest.json"))
    found = [each for each in found if each.is_file()]
    if not found:
        raise DataError(f"expected a tokenizer at {file}, but there is no such file; {_of_sentencepiece(path) or _NAME_ONE}")
    if len(found) > 1 and len({_with_ends(each) for each in found}) > 1:
        raise DataError(
            f"the folders of {path} have different tokenizers, or documents that begin or end with different tokens; name one "
            f"of {', '.join(map(str, found))}"
        )
    return found[0]


def _of_sentencepiece(path: Path) -> str | None:
    """Say how SentencePiece's `tokenizer.model` becomes a `tokenizer.json`; None where there is none.

    The tokenizers library's own conversion knows Unigram models alone, and Llama's are BPE. The one of transformers' bare class
    follows the model's own settings from 5.24 on, and gives SentencePiece's ids; its LlamaTokenizer takes every model for a BPE
    of Llama's settings. `legacy`: a space is put before a text that begins with one, as SentencePiece does.
    """
    file = path / SENTENCEPIECE_FILE if path.is_dir() else path.with_name(SENTENCEPIECE_FILE)
    if not file.is_file():
        return None
    convert = (
        f"from transformers import TokenizersBackend as T; T.from_pretrained({str(file.parent)!r}, legacy=True)"
        f".backend_tokenizer.save({str(file.with_name(TOKENIZER_FILE))!r})"
    )
    return (
        f"{file} is SentencePiece's. Write tokenizer.json beside it, once: pip install 'transformers>=5.24' sentencepiece "
        f"protobuf, then python -c {shlex.quote(convert)}"
    )


def _with_ends(file: Path) -> tuple[str, str]:
    """Identify the tokenizer of a prepared folder, together with the tokens around its documents."""
    manifest = read_json(file.with_name("manifest.json"))
    bos = manifest.get("bos")
    ends = [manifest.get("end_of_document_id"), {"id": bos.get("id")} if isinstance(bos, dict) else bos]
    return identity(load_tokenizer(file)), json.dumps(ends)


def for_documents(tokenizer: Tokenizer, control_tokens: Iterable[str] = ()) -> Tokenizer:
    """Copy a tokenizer so that it encodes any text completely, as plain text, and the same way every time.

    A downloaded tokenizer may truncate or pad, and drop merges at random (BPE dropout). It would also encode the string of a
    special token inside a text as that token, so that a text could end its own document.

    Args:
        tokenizer: left as it is.
        control_tokens: added tokens that are special although the tokenizer does not say so.
    """
    description = describe(tokenizer)
    description["truncation"] = description["padding"] = None
    if "dropout" in description["model"]:
        description["model"]["dropout"] = None
    control = set(control_tokens)
    for added in description["added_tokens"]:
        added["special"] = added["special"] or added["content"] in control

    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = True
    return copy


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that says something of a tokenizer; an empty one if there is no such file.

    Raises:
        DataError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(pointer_problem(file) or f"{file} cannot be read: {error}; correct it, or copy it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(content).__name__}; correct it, or copy it again")
    return content


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of a tokenizer's `tokenizer.json`."""
    return json.loads(tokenizer.to_str())


def fingerprint(tokenizer: Tokenizer) -> str:
    """Compute the sha256, in hexadecimal, of the map from id to token."""
    tokens = sorted((token_id, token) for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode("ascii")).hexdigest()


def identity(tokenizer: Tokenizer) -> str:
    """Compute the sha256, in hexadecimal, of all that decides which ids a text becomes.

    Left out are what preparing turns off or replaces (dropout, truncation, padding, post-processor) and the decoder.
    """
    description = describe(tokenizer)
    deciding = {name: description[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    deciding["model"].pop("dropout", None)
    return hashlib.sha256(json.dumps(_without_unset(deciding), sort_keys=True).encode("ascii")).hexdigest()


def other_tokenizer(tokenizer: Tokenizer, expected_fingerprint: str, expected_identity: str | None) -> str | None:
    """Say how a tokenizer differs from that of some data; None if it is the same, as far as the data tells."""
    found = fingerprint(tokenizer)
    if found != expected_fingerprint:
        return (
            f"differs from the one the data was prepared with (sha256 of the id-to-token map {found[:12]}… and "
            f"{expected_fingerprint[:12]}…)"
        )
    found = identity(tokenizer)
    if expected_identity in (None, found):
        return None
    return (
        "has the ids of the data's, but makes other ids out of a text: its normaliser, pre-tokeniser, merges or added tokens "
        f"differ (identity {found[:12]}… and {expected_identity[:12]}…)"
    )


def _without_unset(value: Any) -> Any:
    # Options that are off are left out, so that one which a later version of the library adds does not change the hash.
    if isinstance(value, dict):
        return {key: _without_unset(each) for key, each in value.items() if each is not None and each is not False}
    return [_without_unset(each) for each in value] if isinstance(value, list) else value


def end_of_document_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """Find the id of the end-of-document token: `token`, or if that is None the first of the usual names.

    Raises:
        DataError: the tokenizer has no such token.
    """
    name = usual_end_of_document(tokenizer) if token is None else token
    token_id = None if name is None else tokenizer.token_to_id(name)
    if token_id is not None:
        return token_id
    if token is not None:
        raise DataError(f"the tokenizer has no token {token!r} to end documents with; name one that it has")
    raise DataError(
        f"the tokenizer has no end-of-document token: expected one of {', '.join(_END_OF_DOCUMENT_NAMES)}; name its own with "
        f"--end-of-document, or add {END_OF_DOCUMENT} to it"
    )


def usual_end_of_document(tokenizer: Tokenizer) -> str | None:
    """Return the first of the usual names of an end-of-document token that the tokenizer has; None if it has none."""
    return next((name for name in _END_OF_DOCUMENT_NAMES if tokenizer.token_to_id(name) is not None), None)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return the vocabulary size that a model needs: the highest id + 1, gaps included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
