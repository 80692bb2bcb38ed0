"""The bytes of text that each token stands for, by which losses of different tokenizers can be compared (bits per byte).

A token's text is read from the vocabulary, not decoded: a token that is a part of a character has no text of its own. Three
kinds of vocabulary tell the bytes. In a byte-level one every character of a token is a byte. In one with a mark for the space
(U+2581, as SentencePiece has it) a token is its text, and `<0x0A>` the byte 10 where bytes are the fallback. In a plain one a
token is its text. Where the tokenizer changes the text in other ways (lower case, accents, white space that it drops, a mark
for the end of a word) or drops characters, the bytes are not known; neither are those of a token for unknown text.

The text is the one that the tokenizer splits: composed, if it composes (NFC), and with a space for a U+2581 of its own.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

NO_TEXT, UNKNOWN = 0, -1
"""Lengths of a token that stands for no text, as the end of a document does, and of one whose text is not known."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# UTF-8 never has these bytes.
_NEVER_USED = {0xC0, 0xC1, *range(0xF5, 0x100)}
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256) if byte not in _NEVER_USED}
# A byte-level vocabulary's characters for bytes; these bytes represent themselves.
_ALPHABET = set(pre_tokenizers.ByteLevel.alphabet())
_BYTE_LETTERS = _ALPHABET - {chr(byte) for byte in _NEVER_USED}
# What only cuts the text into pieces; `Split` and `Punctuation` unless they remove what they cut at.
_SPLITTING = {"Split", "Punctuation", "Digits", "UnicodeScripts", "ByteLevel", "Metaspace"}


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token of a vocabulary.

    lengths_V: int32 [V], bytes of text, or NO_TEXT or UNKNOWN.
    opens_with_space: the tokenizer puts a space before a text, which the first token then has and the text has not.
    unknown: the reason why no token's text is known; None if those of UNKNOWN length are exceptions.
    """

    lengths_V: np.ndarray
    opens_with_space: bool = False
    unknown: str | None = None


def unknown_bytes(vocab_size: int, reason: str) -> TokenBytes:
    """Say that no token's text is known."""
    return TokenBytes(np.full(vocab_size, UNKNOWN, np.int32), unknown=reason)


def bytes_of_tokens(tokenizer: Tokenizer, end_of_document_id: int, vocab_size: int) -> TokenBytes:
    """Measure every token of a tokenizer.

    Special tokens stand for no text, because text is encoded without them. vocab_size: V; ids that the tokenizer does not have
    are UNKNOWN.
    """
    parts = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    reason = _changes_text(parts, vocabulary)
    if reason is not None:
        return unknown_bytes(vocab_size, f"the tokenizer {reason}")

    # The tokens of the model, but for the one of unknown text.
    lengths_V = np.full(vocab_size, UNKNOWN, np.int32)
    measure = _Measure(parts)
    for token, token_id in vocabulary.items():
        if token_id < vocab_size:
            lengths_V[token_id] = measure.length(token)

    # Added tokens. One that takes white space along has no text of its own, and after one that cuts the text in two the second
    # part may begin with a space that is the tokenizer's.
    opens = _opens_with_space(parts)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        if token_id < vocab_size:
            is_known = not (added.lstrip or added.rstrip or opens)
            lengths_V[token_id] = NO_TEXT if added.special else len(added.content.encode()) if is_known else UNKNOWN
    unknown_id = _unknown_id(parts, vocabulary)
    if unknown_id is not None and unknown_id < vocab_size:
        lengths_V[unknown_id] = UNKNOWN
    lengths_V[end_of_document_id] = NO_TEXT
    return TokenBytes(lengths_V, opens)


class _Measure:
    """Measures a vocabulary's tokens, as the parts of its tokenizer say."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.is_byte_level = _is_byte_level(parts)
        self.has_byte_tokens = bool(parts["model"].get("byte_fallback"))
        self.marks = _space_marks(parts)

    def length(self, token: str) -> int:
        if self.is_byte_level:
            return len(token) if _ALPHABET.issuperset(token) else UNKNOWN
        if self.has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            return 1
        for mark in self.marks:
            token = token.replace(mark, " ")
        return len(token.encode())


def _changes_text(parts: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """Name the part of a tokenizer that keeps its tokens from saying their bytes; None if there is none."""
    model = parts["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return f"has a model of type {model['type']}, which drops white space or cuts words off"
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        return "marks the parts of words"

    # Normalisers and pre-tokenisers that change the text.
    for part in _parts(parts, "normalizer"):
        if not (part["type"] in ("NFC", "Prepend", "ByteLevel") or _is_mark_for_space(part)):
            return f"changes the text before it splits it (normalizer {part['type']})"
    for number, part in enumerate(_parts(parts, "pre_tokenizer")):
        if part["type"] not in _SPLITTING or part.get("behavior") == "Removed":
            return f"drops what it splits at (pre-tokenizer {part['type']})"
        if number and _adds_space(part):
            return f"puts a space before every part of a text (pre-tokenizer {part['type']})"

    # The mark for the space, if no token has it, is spelled in the bytes of its own.
    missing = [mark for mark in _space_marks(parts) if mark not in vocabulary]
    if model.get("byte_fallback") and missing:
        return f"spells {missing[0]}, its mark for the space, in bytes"

    # A character that no token has must not vanish.
    if model["type"] == "BPE" and model.get("unk_token") is None:
        needed = _BYTE_LETTERS if _is_byte_level(parts) else _BYTE_TOKENS if model.get("byte_fallback") else None
        if needed is None or not vocabulary.keys() >= needed:
            return "drops characters that its vocabulary does not have"
    return None


def _parts(parts: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """List the normalizers or pre-tokenizers in the order in which they act."""
    whole = parts[kind]
    if whole is None:
        return []
    inner = whole.get("normalizers") or whole.get("pretokenizers") if whole["type"] == "Sequence" else [whole]
    return inner or []


def _is_byte_level(parts: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for kind in ("normalizer", "pre_tokenizer") for part in _parts(parts, kind))


def _space_marks(parts: dict[str, Any]) -> list[str]:
    marks = [part["content"] for part in _parts(parts, "normalizer") if part["type"] == "Replace"]
    return marks + [part["replacement"] for part in _parts(parts, "pre_tokenizer") if part["type"] == "Metaspace"]


def _is_mark_for_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and part["pattern"] == {"String": " "} and len(part["content"]) == 1


def _opens_with_space(parts: dict[str, Any]) -> bool:
    prepends = any(part["type"] == "Prepend" for part in _parts(parts, "normalizer"))
    return prepends or any(map(_adds_space, _parts(parts, "pre_tokenizer")))


def _adds_space(part: dict[str, Any]) -> bool:
    return bool(part.get("add_prefix_space")) or part.get("prepend_scheme", "never") != "never"


def _unknown_id(parts: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    model = parts["model"]
    return model.get("unk_id") if model["type"] == "Unigram" else vocabulary.get(model.get("unk_token"))
