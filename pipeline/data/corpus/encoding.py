"""Encoding: from texts to ids that no text can forge, and an account of what a tokenizer did not take.

No id of a special token comes from text. Declared special tokens are turned off before (`tokenizer.for_documents`), but that
stops neither pieces of the model (`</s>` or `<0x0A>` in a Unigram vocabulary are pieces like any other) nor a normaliser that
makes their strings (of full-width letters, by NFKC). So the ids are checked after encoding, which is cheap; a text with such an
id is encoded again, with a boundary after the first character of every special token's string, over which no piece can
reach. A token of one character has no such boundary, and its texts are left out or refused.

`<0x0A>` is also how a tokenizer with byte fallback writes a newline, and the unknown token stands for what has no other, so
these ids alone say nothing: the text is searched for their strings.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers

from pipeline.data.corpus.removed_text import RemovedText, is_missed
from pipeline.data.shards.writer import token_dtype
from pipeline.data.tokenizer import describe, for_documents, vocab_size

# Names that only control tokens have. An added token of another name that is not declared special, such as a run of spaces or
# "<td>", is meant to be found in text.
_CONTROL = re.compile(
    r"<[|｜].+[|｜]>|</?s>|<(?:unk|pad|bos|eos|eod|mask|cls|sep)>|\[(?:UNK|PAD|CLS|SEP|MASK|BOS|EOS)\]"  # noqa: RUF001
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ORDINARY, _AMBIGUOUS, _RESERVED = 0, 1, 2
# So many characters without a token are named.
_SHOWN = 12

# Components that keep every character, if their options say so too.
_KEEPING = {
    *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Lowercase", "ByteLevel", "Metaspace"),
    *("Split", "Digits", "Punctuation", "String", "Regex"),
}
# Normalisers that cannot make the string of a special token out of another text.
_HARMLESS = {"Sequence", "NFC", "Prepend", "Replace", "String", "Regex"}


@dataclass(frozen=True)
class Encoded:
    """An encoded text.

    ids: uint16 or uint32 [n], by the size of the vocabulary, with the tokens around the document; None if `problem` says why
        the tokenizer cannot encode it.
    is_empty: there is no token but those around the document.
    has_special_text: the text, as it is or once it is normalised, had the string of a special token, which was encoded as text.
    lost: characters, or pieces of text, without a token: the first few of them.
    """

    ids: np.ndarray | None
    problem: str = ""
    is_empty: bool = False
    has_special_text: bool = False
    lost: str = ""


class Encoder:
    """Encoder of texts to ids, with a token appended to each and, if there is a BOS token, one before it.

    declared: tokens that are special although the tokenizer does not say so.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_of_document_id: int, bos_id: int | None = None, declared: Iterable[str] = ()
    ) -> None:
        self.dtype = token_dtype(vocab_size(tokenizer))
        self._end, self._begin = end_of_document_id, [] if bos_id is None else [bos_id]
        self._description = describe(tokenizer)

        # The kind of every id, and of every token that is not ordinary.
        self._special = _special_tokens(self._description, tokenizer, {end_of_document_id, *self._begin}, declared)
        self._kinds = np.zeros(vocab_size(tokenizer), np.uint8)
        for token, kind in self._special.items():
            self._kinds[tokenizer.token_to_id(token)] = kind
        unknown = _unknown_token(self._description)
        self._unknown = None if unknown is None else tokenizer.token_to_id(unknown)
        self._strings = re.compile("|".join(map(re.escape, self._special)))
        self._markers = ["<0x"] if any(map(_BYTE.fullmatch, self._special)) else []
        self._markers += [unknown] if self._special.get(unknown or "") == _AMBIGUOUS and unknown else []

        self._plain = for_documents(tokenizer, [token for token, kind in self._special.items() if kind == _RESERVED])
        self._keeps_all = _keeps_all(self._description)
        self._removed = RemovedText(self._description)
        # The one that does not tell the places of tokens is faster.
        plain, needs_places = self._plain, self._removed.in_pre_tokenizer
        self._encode_batch = plain.encode_batch if needs_places else plain.encode_batch_fast
        self._has_token: dict[str, bool] = {}

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Encode texts, in order."""
        try:
            encodings = self._encode_batch(texts, add_special_tokens=False)
        except BaseException as error:
            if not _is_of_the_tokenizer(error):
                raise
            # Each by itself, to find the one.
            yield from [Encoded(None, _sentence(error))] if len(texts) == 1 else (e for t in texts for e in self.encode([t]))
            return
        for text, encoding in zip(texts, encodings, strict=True):
            yield self._checked(text, encoding)

    def _checked(self, text: str, encoding: Encoding) -> Encoded:
        found = encoding.ids
        ids, has_special_text = self._with_ends(found), self._strings.search(text) is not None
        kind = self._kind(ids)

        # As text, where special tokens came of it.
        if kind == _RESERVED or (kind == _AMBIGUOUS and self._may_have_marker(text)):
            try:
                again = self._guarded.encode(text, add_special_tokens=False).ids
            except BaseException as error:
                if not _is_of_the_tokenizer(error):
                    raise
                return Encoded(None, _sentence(error))
            has_special_text = has_special_text or again != found  # a normaliser makes such strings too
            ids = self._with_ends(again)
            if self._kind(ids) == _RESERVED:
                inner = self._inner(ids)
                token = self._plain.id_to_token(int(inner[self._kinds[inner] == _RESERVED][0]))
                return Encoded(None, f"the tokenizer makes the special token {token!r} out of its text")

        return Encoded(ids, "", not len(self._inner(ids)), has_special_text, self._lost(text, ids, encoding))

    def _with_ends(self, found: list[int]) -> np.ndarray:
        return np.array([*self._begin, *found, self._end], self.dtype)

    def _inner(self, ids: np.ndarray) -> np.ndarray:
        return ids[len(self._begin) : -1]

    def _kind(self, ids: np.ndarray) -> int:
        return int(self._kinds[self._inner(ids)].max(initial=_ORDINARY))

    def _may_have_marker(self, text: str) -> bool:
        """Check if a text has, once it is normalised, the string of an ambiguous token."""
        normalizer = self._plain.normalizer
        if normalizer is not None and not _types(self._description["normalizer"]) <= _HARMLESS:
            text = normalizer.normalize_str(text)
        return any(marker in text for marker in self._markers)

    @cached_property
    def _guarded(self) -> Tokenizer:
        """The tokenizer with a boundary after the first character of each special token's string."""
        guarded = Tokenizer.from_str(self._plain.to_str())
        guarded.encode_special_tokens = True
        strings = [re.escape(token[0]) + f"(?={re.escape(token[1:])})" for token in self._special if len(token) > 1]
        boundary = pre_tokenizers.Split(Regex("|".join(strings)), "isolated")
        before = [] if guarded.pre_tokenizer is None else [guarded.pre_tokenizer]
        guarded.pre_tokenizer = pre_tokenizers.Sequence([*before, boundary])
        return guarded

    def _lost(self, text: str, ids: np.ndarray, encoding: Encoding) -> str:
        """List what of a text has no token: characters that are dropped, or the unknown token if it stands for some."""
        lost = "" if self._keeps_all else self._dropped(text)
        lost = lost or self._removed.by_normalizer(text)
        if not lost and self._removed.in_pre_tokenizer:
            lost = self._removed.by_pre_tokenizer(text, encoding.offsets)
        if not lost and self._unknown is not None and (self._inner(ids) == self._unknown).any():
            lost = str(self._plain.id_to_token(self._unknown))
        return lost[:_SHOWN]

    def _dropped(self, text: str) -> str:
        suspects = "".join(sorted(character for character in set(text) if not self._is_kept(character)))
        # Some have a token at some places in a word only. If every place is covered, these have theirs.
        return suspects if suspects and self._num_covered(text) < len(text) else ""

    def _num_covered(self, text: str) -> int:
        """Count the characters of a text that a token stands for."""
        # A BPE that drops characters moves the offsets of what follows, so only their number is right.
        offsets = self._plain.encode(text, add_special_tokens=False).offsets
        return len({place for start, end in offsets for place in range(start, end)})

    def _is_kept(self, character: str) -> bool:
        kept = self._has_token.get(character)
        if kept is None:
            kept = self._has_token[character] = self._finds_token(character)
        return kept

    def _finds_token(self, character: str) -> bool:
        if character.isspace():
            return True
        normalizer = self._plain.normalizer
        normalized = character if normalizer is None else normalizer.normalize_str(character)
        if not normalized.strip() and not is_missed(character):
            return True
        # At the beginning, in the middle and at the end of a word, which may have tokens of their own. A token alone would say
        # nothing: some tokenizers put one for a space before any text.
        try:
            return self._num_covered(3 * character) == 3
        except BaseException as error:
            if not _is_of_the_tokenizer(error):
                raise
            return True


def _special_tokens(
    description: dict[str, Any], tokenizer: Tokenizer, ends: Iterable[int], declared: Iterable[str]
) -> dict[str, int]:
    """Find the tokens that must not come of text, and those that may but not of their own string, by their kinds."""
    model = description["model"]
    added = {token["content"]: token["special"] for token in description["added_tokens"]}
    # A piece that merging makes is one of text, whatever it looks like.
    merged = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model.get("merges", ())}

    kinds = dict.fromkeys(declared, _RESERVED)
    for token in tokenizer.get_vocab(with_added_tokens=True):
        if token[:1] in "<[" and token not in merged and (_CONTROL.fullmatch(token) or _BYTE.fullmatch(token)):
            kinds[token] = _AMBIGUOUS if _BYTE.fullmatch(token) else _RESERVED
        elif added.get(token):
            kinds[token] = _RESERVED
    if (unknown := _unknown_token(description)) in kinds and unknown is not None:
        kinds[unknown] = _AMBIGUOUS
    return kinds | {str(tokenizer.id_to_token(token_id)): _RESERVED for token_id in ends}


def _unknown_token(description: dict[str, Any]) -> str | None:
    """Return the token that stands for text without a token of its own; None if there is none."""
    model = description["model"]
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    unknown = model.get("unk_token")
    return unknown if unknown in model["vocab"] or any(a["content"] == unknown for a in description["added_tokens"]) else None


def _keeps_all(description: dict[str, Any]) -> bool:
    """Check by a tokenizer's parts if every character of any text gets a token. If not, each character is tried once."""
    parts = [description["normalizer"], description["pre_tokenizer"]]
    if any(not _types(part) <= _KEEPING for part in parts) or any(f'"{word}"' in json.dumps(parts) for word in ("Removed", "")):
        return False
    model = description["model"]
    pieces = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else set(model["vocab"])
    if model.get("byte_fallback"):
        return pieces.issuperset(f"<0x{byte:02X}>" for byte in range(256))
    if model["type"] == "BPE" and any("ByteLevel" in _types(part) for part in parts):
        return pieces.issuperset(pre_tokenizers.ByteLevel.alphabet())
    return _unknown_token(description) is not None


def _types(part: Any) -> set[str]:
    """The names of a normaliser's or pre-tokeniser's components, those within sequences and patterns included."""
    if isinstance(part, dict):
        found = {part["type"]} if isinstance(part.get("type"), str) else set()
        pattern = {key for key in ("String", "Regex") if key in part}
        return found.union(pattern, *map(_types, part.values()))
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


def _is_of_the_tokenizer(error: BaseException) -> bool:
    # The library raises bare Exception; a panic of its Rust code is a BaseException of a class that cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _sentence(error: BaseException) -> str:
    return f"the tokenizer cannot encode it: {' '.join(str(error).split())[:300]}"
