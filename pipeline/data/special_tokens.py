"""The tokens that end and begin documents, as the folder of a tokenizer declares them.

A prepared folder declares both in its manifest. A model's folder declares the end-of-document token in up to three files:
`tokenizer_config.json` (a token), `generation_config.json` and `config.json` (one or more ids). They must agree: a model that
meets documents with another end than it knows is silently worse.

The beginning-of-document token (BOS) is put before each document's first token, so that the model also learns to begin one.
By `--bos auto` this follows `add_bos_token` in `tokenizer_config.json`, and without it the tokenizer's own post-processor.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.declared_tokens import MANIFEST, TOKENIZER_CONFIG, declared_tokens, token_text
from pipeline.data.errors import DataError
from pipeline.data.tokenizer import describe, end_of_document_id, read_json

BOS_RULES = ("auto", "never", "always")
_SHOWN = 4
_MODEL_CONFIGS = ("generation_config.json", "config.json")
# Names of the BOS token in various model families, for `--bos always` where nothing declares it.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "[BOS]")  # noqa: RUF001


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens around each document.

    end_of_document, end_of_document_id: always there. end_from: what declares it, for messages.
    bos, bos_id: None if documents begin with their first real token.
    bos_rule: "auto", "never" or "always", as it was asked for.
    declared: tokens that are special although the tokenizer does not say so; declared_characters: those that are characters of
        text too, and stay so (`declared_tokens`).
    """

    end_of_document: str
    end_of_document_id: int
    end_from: str
    bos: str | None = None
    bos_id: int | None = None
    bos_rule: str = "never"
    declared: tuple[str, ...] = ()
    declared_characters: tuple[str, ...] = ()

    def __str__(self) -> str:
        begin = "without a BOS token" if self.bos is None else f"with {self.bos!r} (id {self.bos_id})"
        return (
            f"documents end with {self.end_of_document!r} (id {self.end_of_document_id}, {self.end_from}) "
            f"and begin {begin} (--bos {self.bos_rule})"
            + _listed("; declared special beside the tokenizer: ", self.declared)
            + _listed("; declared special, but text too: ", self.declared_characters)
        )


def _listed(what: str, tokens: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN])) + (" …" if len(tokens) > _SHOWN else "")
    return what + shown if tokens else ""


def special_tokens(
    tokenizer: Tokenizer, folder: Path | None, end_of_document: str | None = None, bos_rule: str = "auto"
) -> SpecialTokens:
    """Choose the tokens around each document.

    Args:
        tokenizer: has the tokens.
        folder: where the tokenizer lies, with the files that declare them; None if it lies nowhere.
        end_of_document: the token asked for; None for the declared one, or if there is none one of the usual names.
        bos_rule: one of BOS_RULES.

    Raises:
        DataError: the declarations contradict each other, name what the tokenizer does not have, or cannot be read; there is no
            token as asked for; or BOS and end of document would be the same token.
    """
    declared = None if end_of_document is not None or folder is None else declared_end_of_document(tokenizer, folder)
    end_id = end_of_document_id(tokenizer, declared[0] if declared else end_of_document)
    bos = None if bos_rule == "never" else _bos_token(tokenizer, folder, bos_rule)
    bos_id = None if bos is None else _token_id(tokenizer, bos, "the BOS token")
    if bos_id == end_id:
        raise DataError(
            f"the tokenizer's BOS token {bos!r} is also the one that ends documents, so a row could not tell the two ends of a "
            "document apart; leave it out with --bos never, or name another end with --end-of-document"
        )
    end_from = "--end-of-document" if end_of_document is not None else declared[1] if declared else "by its usual name"
    others = ((), ()) if folder is None else declared_tokens(tokenizer, folder)
    return SpecialTokens(str(tokenizer.id_to_token(end_id)), end_id, end_from, bos, bos_id, bos_rule, *others)


def declared_end_of_document(tokenizer: Tokenizer, folder: Path) -> tuple[str, str] | None:
    """Find the end-of-document token that a folder declares, and the file that does; None if none does.

    Raises:
        DataError: the files contradict each other or leave a choice, name what the tokenizer does not have, or cannot be read.
    """
    declarations = list(_end_declarations(tokenizer, Path(folder)))
    if not declarations:
        return None
    listed = "; ".join(f"{source} says {' or '.join(map(repr, tokens))}" for source, tokens in declarations)
    common = set.intersection(*(set(tokens) for _, tokens in declarations))
    if len(common) != 1:
        problem = "different end-of-document tokens" if not common else "several end-of-document tokens"
        raise DataError(f"{folder} declares {problem} ({listed}); choose one with --end-of-document TOKEN")
    return common.pop(), declarations[0][0]


def adds_bos(tokenizer: Tokenizer, folder: Path | None) -> bool:
    """Check if the tokenizer puts a BOS token before a text, by its folder's declaration or else by its post-processor."""
    if folder is not None:
        if (prepared := _prepared_bos(folder)) is not None:
            return "id" in prepared
        declared = read_json(folder / TOKENIZER_CONFIG).get("add_bos_token")
        if isinstance(declared, bool):
            return declared
    return bool(_leading_tokens(tokenizer))


def declared_bos_id(tokenizer: Tokenizer, folder: Path) -> int | None:
    """Find the id that a model folder's tokenizer puts before a text by itself; None if it puts none.

    Raises:
        DataError: the declarations contradict each other, name what the tokenizer does not have, or cannot be read.
    """
    bos = _bos_token(tokenizer, folder, "auto")
    return None if bos is None else _token_id(tokenizer, bos, "the BOS token")


def declaration(tokenizer_json: bytes, end_of_document_id: int, is_bos_known: bool, bos_id: int | None) -> bytes:
    """Write the `tokenizer_config.json` of a model that was trained on prepared data.

    It declares the tokens around a document as the data has them, whatever the tokenizer would do by itself.

    Args:
        tokenizer_json: the tokenizer.
        end_of_document_id: of the data.
        is_bos_known: false if nothing is to be said of a BOS token.
        bos_id: of the data; None if its documents begin without one.
    """
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    declared: dict[str, Any] = {"eos_token": tokenizer.id_to_token(end_of_document_id)}
    if is_bos_known:
        declared["add_bos_token"] = bos_id is not None
    if bos_id is not None:
        declared["bos_token"] = tokenizer.id_to_token(bos_id)
    return (json.dumps(declared, indent=2, ensure_ascii=False) + "\n").encode()


def _bos_token(tokenizer: Tokenizer, folder: Path | None, bos_rule: str) -> str | None:
    if bos_rule == "auto" and not adds_bos(tokenizer, folder):
        return None

    # A prepared folder says what its documents do begin with.
    prepared = None if folder is None else _prepared_bos(folder)
    if folder is not None and prepared is not None and "id" in prepared:
        return _token_of(tokenizer, prepared["id"], folder / MANIFEST)

    # What the post-processor puts and what tokenizer_config.json names must be one token.
    leading = _leading_tokens(tokenizer)
    if len(leading) > 1:
        raise DataError(
            f"the tokenizer puts several tokens before a text, {', '.join(leading)}; leave them out with --bos never"
        )
    named = list(dict.fromkeys([*leading, *([] if folder is None else _named_bos(tokenizer, folder))]))
    if len(named) > 1:
        raise DataError(
            f"the tokenizer and {TOKENIZER_CONFIG} in {folder} name different BOS tokens, {' and '.join(map(repr, named))}; "
            "correct one of them, or leave it out with --bos never"
        )
    usual = [name for name in _BOS_NAMES if tokenizer.token_to_id(name) is not None]
    if not (named or usual):
        raise DataError("the tokenizer has no BOS token, and nothing names one; prepare with --bos never")
    return (named or usual)[0]


def _prepared_bos(folder: Path) -> dict[str, Any] | None:
    """Read what a prepared folder's manifest says of its BOS token; None if it says nothing, or there is no manifest."""
    declared = read_json(folder / MANIFEST).get("bos")
    return declared if isinstance(declared, dict) else None


def _named_bos(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """List the BOS token that the folder names; the ids of the model's configurations count only if no token is named."""
    token = token_text(read_json(folder / TOKENIZER_CONFIG).get("bos_token"), folder / TOKENIZER_CONFIG, "bos_token")
    if token is not None:
        return [token]
    for name in _MODEL_CONFIGS:
        if (token_id := read_json(folder / name).get("bos_token_id")) is not None:
            return [_token_of(tokenizer, token_id, folder / name)]
    return []


def _leading_tokens(tokenizer: Tokenizer) -> list[str]:
    """List the tokens that the post-processor puts before a text."""
    leading: list[str] = []
    for processor in _processors(describe(tokenizer)["post_processor"]):
        if processor["type"] in ("BertProcessing", "RobertaProcessing"):
            leading = [processor["cls"][0], *leading]
        elif processor["type"] == "TemplateProcessing":
            before: list[str] = []
            for piece in processor["single"]:
                if "SpecialToken" not in piece:
                    break
                before += processor["special_tokens"][piece["SpecialToken"]["id"]]["tokens"]
            leading = before + leading
    return leading


def _processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor is not None and processor["type"] == "Sequence":
        for each in processor["processors"]:
            yield from _processors(each)
    elif processor is not None:
        yield processor


def _end_declarations(tokenizer: Tokenizer, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each file that declares the end of a document, and the tokens that it allows."""
    # A prepared folder says what its documents do end with.
    if (prepared := read_json(folder / MANIFEST).get("end_of_document_id")) is not None:
        yield MANIFEST, [_token_of(tokenizer, prepared, folder / MANIFEST)]
        return

    # A model's folder.
    token = token_text(read_json(folder / TOKENIZER_CONFIG).get("eos_token"), folder / TOKENIZER_CONFIG, "eos_token")
    if token is not None:
        _token_id(tokenizer, token, f"{folder / TOKENIZER_CONFIG}: eos_token")
        yield TOKENIZER_CONFIG, [token]
    for name in _MODEL_CONFIGS:
        declared = read_json(folder / name).get("eos_token_id")
        if declared is not None:
            ids = declared if isinstance(declared, list) else [declared]
            yield name, [_token_of(tokenizer, token_id, folder / name) for token_id in ids]


def _token_of(tokenizer: Tokenizer, token_id: Any, file: Path) -> str:
    is_id = isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < 1 << 32
    token = tokenizer.id_to_token(token_id) if is_id else None
    if token is None:
        raise DataError(
            f"{file} names {token_id!r} as the id of a special token, but the tokenizer has no such id; correct the file, or "
            "choose with --end-of-document TOKEN and --bos"
        )
    return token


def _token_id(tokenizer: Tokenizer, token: str, what: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise DataError(
            f"{what} is {token!r}, but the tokenizer has no such token; correct it, or choose with --end-of-document TOKEN and "
            "--bos"
        )
    return token_id
