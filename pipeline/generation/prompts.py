"""From texts to ids and back, as the model's data has them: BOS before a text if its documents begin with one."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.data.special_tokens import SpecialTokens
from pipeline.data.tokenizer import for_documents


class PromptError(ValueError):
    """A prompt that the model cannot continue."""


def read_prompts(file: Path) -> list[str]:
    """Read a file of prompts, one a line; empty lines are left out.

    Raises:
        PromptError: the file cannot be read as UTF-8, or has no prompt.
    """
    try:
        # A byte order mark is none of the text; of the characters that part lines elsewhere only the newline ends a prompt.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"--prompt-file: {file} is not UTF-8: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"--prompt-file: {file} has no prompt; expected one a line")
    return prompts


def encode_prompts(
    tokenizer: Tokenizer, special: SpecialTokens, texts: Sequence[str], context_length: int | None
) -> list[list[int]]:
    """Encode prompts; strings of special tokens are plain text, as they were in training.

    Raises:
        PromptError: a prompt has no token, or fills the context, so that nothing can follow.
    """
    encoder = for_documents(tokenizer)
    begin = [] if special.bos_id is None else [special.bos_id]
    prompts = [begin + encoder.encode(text, add_special_tokens=False).ids for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if not ids:
            raise PromptError(f"--prompt: {text!r} has no token, and documents begin without a BOS token; write something")
        if context_length is not None and len(ids) >= context_length:
            raise PromptError(
                f"--prompt: {text[:40]!r} has {len(ids)} tokens, and the model was trained on rows of {context_length}; at "
                f"most {context_length - 1} leave room for one"
            )
    return prompts


def stop_ids(tokenizer: Tokenizer, special: SpecialTokens, stops: Sequence[str]) -> frozenset[int]:
    """Return the ids that end a completion: of the end of a document, and of the tokens named.

    Raises:
        PromptError: what is named is not one token.
    """
    ids = {special.end_of_document_id}
    for stop in stops:
        found = tokenizer.token_to_id(stop)
        encoded = tokenizer.encode(stop, add_special_tokens=False).ids
        if found is None and len(encoded) != 1:
            raise PromptError(f"--stop: {stop!r} is {len(encoded)} tokens; expected one token")
        ids.add(encoded[0] if found is None else found)
    return frozenset(ids)


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Decode ids; special tokens have no text."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


class TextStream:
    """The text of one completion as it grows, a piece at a time."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.text = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that they add. A part of a character waits for the rest of it."""
        self.token_ids += token_ids
        whole = text_of(self.tokenizer, self.token_ids)
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self.text = whole[len(self.text) :], whole
        return new

    def rest(self) -> str:
        """Return the text that still waits, for a completion that ends within a character."""
        return text_of(self.tokenizer, self.token_ids)[len(self.text) :]
