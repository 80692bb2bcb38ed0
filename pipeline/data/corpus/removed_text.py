"""Text that a tokenizer removes because of what it stands among, before any token is looked for.

A `Split` that removes what it matches, or a `Replace` by nothing or by white space, leaves no trace in the ids, although each
character by itself has a token. What a pre-tokeniser removes lies between the places of the tokens, and what a normaliser
removes is missing from its output. Only tokenizers with such a component pay for that: their texts take up to twice as long.

White space is another matter: many tokenizers take all of it for one space, by intent. That is said once of a tokenizer, not of
every document.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, normalizers

from pipeline.data.tokenizer import for_documents

# Texts that differ from "b c" in their white space alone.
WHITE_SPACE = {
    "b\nc": "line ends",
    "b\tc": "tabs",
    "b  c": "runs of spaces",
    "\tb c": "white space before the first word",
    "b c\n": "white space after the last word",
}
# Regular expressions of white space, such as `\s+` and ` {2,}`.
_WHITE_SPACE = re.compile(r"(?:\\s|\s|[+*?]|\{\d*,?\d*\})+")


class RemovedText:
    """Finds the text that the components of a tokenizer remove.

    description: of the tokenizer (`tokenizer.describe`).

    in_pre_tokenizer: true if its pre-tokeniser can remove text.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        self.in_pre_tokenizer = any(map(_removes, _components(description["pre_tokenizer"])))
        parts = _components(description["normalizer"])
        removing = [number for number, part in enumerate(parts) if _removes(part)]
        # Each by what it is given and what it makes of that.
        self._normalizers = [(_normalizer(parts[:number]), _normalizer([parts[number]])) for number in removing]

    def by_normalizer(self, text: str) -> str:
        """List the characters of a text that its normaliser removes, the most frequent first."""
        removed: Counter[str] = Counter()
        for earlier, removing in self._normalizers:
            before = earlier.normalize_str(text)
            if (after := removing.normalize_str(before)) != before:
                removed += Counter(before) - Counter(after)
        return "".join(character for character, _ in removed.most_common() if is_missed(character))

    def by_pre_tokenizer(self, text: str, offsets: Iterable[tuple[int, int]]) -> str:
        """Return the text that lies between the tokens, given the places of these."""
        gaps, end = [], 0
        for token_start, token_end in offsets:
            if token_start > end:
                gaps.append(text[end:token_start])
            end = max(end, token_end)
        return "".join(filter(is_missed, "".join([*gaps, text[end:]])))


def is_missed(character: str) -> bool:
    """Check that a character is neither white space nor an accent or control character, which tokenizers remove by intent."""
    return not character.isspace() and unicodedata.category(character) not in ("Mn", "Cc", "Cf")


def lost_white_space(tokenizer: Tokenizer) -> list[str]:
    """List the kinds of white space that a tokenizer does not tell from a single space, or from none."""
    plain = for_documents(tokenizer)
    try:
        one_space = plain.encode("b c", add_special_tokens=False).ids
        found = {text: plain.encode(text, add_special_tokens=False).ids for text in WHITE_SPACE}
    except Exception:  # the library raises bare Exception; a text that cannot be encoded is counted where it comes
        return []
    return [WHITE_SPACE[text] for text, ids in found.items() if ids == one_space]


def _components(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The components of a normaliser or pre-tokeniser, in order, those within sequences too."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    inner = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
    return [component for each in inner for component in _components(each)]


def _removes(component: dict[str, Any]) -> bool:
    """Check if a component can remove more than white space."""
    match component["type"]:
        case "Replace":
            return not component["content"].strip() and not _is_white_space(component["pattern"])
        case "Split":
            is_space = _is_white_space(component["pattern"]) and not component["invert"]
            return component["behavior"] == "Removed" and not is_space
        case "Punctuation":
            return component["behavior"] == "Removed"
        case "CharDelimiterSplit":
            return not component["delimiter"].isspace()
    return False


def _is_white_space(pattern: dict[str, str]) -> bool:
    """Check if a pattern matches white space alone."""
    return pattern["String"].isspace() if "String" in pattern else _WHITE_SPACE.fullmatch(pattern["Regex"]) is not None


def _normalizer(parts: list[dict[str, Any]]) -> normalizers.Normalizer:
    description = {
        "normalizer": {"type": "Sequence", "normalizers": parts},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    return Tokenizer.from_str(json.dumps(description)).normalizer
