"""The tokenizer files of a model that was trained on prepared data, as other programs read them.

They treat a text as the data's documents were treated, whatever the tokenizer would do by itself: with the same BOS token or
none, with nothing after it, never cut, padded or encoded at random.
"""

import json
from typing import Any

from tokenizers import Tokenizer, processors

from pipeline.data.errors import DataError
from pipeline.data.special_tokens import TOKENIZER_CONFIG, declaration
from pipeline.data.tokenizer import TOKENIZER_FILE, describe

# Tokens made for padding in various model families, in the order in which they are tried.
_PADDING_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_SAMPLE_TEXT = "a"


def tokenizer_files(
    content: bytes, end_of_document_id: int, is_bos_known: bool, bos_id: int | None, context_length: int
) -> tuple[dict[str, bytes], int]:
    """Make tokenizer.json and tokenizer_config.json.

    Args:
        content: the data's tokenizer.json.
        end_of_document_id: of the data.
        is_bos_known: false if the data does not say how its documents begin; the tokenizer is then left to do as it does.
        bos_id: of the data; None if its documents begin without one.
        context_length: T, tokens of a row.

    Returns:
        Contents by file name, and the id of the padding token: one made for it, else that of the end of a document.

    Raises:
        DataError: the tokenizers library cannot read the tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
        pad_ids = [tokenizer.token_to_id(name) for name in _PADDING_NAMES]
        pad_id = next((found for found in pad_ids if found is not None), end_of_document_id)
        config = json.loads(declaration(content, end_of_document_id, is_bos_known, bos_id))
        written = _as_the_data(tokenizer, is_bos_known, bos_id)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the tokenizer of the data cannot be read: {error}") from None

    # This class takes tokenizer.json as it is; those of model families rebuild it by rules of their own.
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.id_to_token(pad_id),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    encoded = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return {TOKENIZER_FILE: written or content, TOKENIZER_CONFIG: encoded}, pad_id


def _as_the_data(tokenizer: Tokenizer, is_bos_known: bool, bos_id: int | None) -> bytes | None:
    """Return a tokenizer.json that encodes a text as the data's; None if the tokenizer does so already."""
    description = describe(tokenizer)
    plain = tokenizer.encode(_SAMPLE_TEXT, add_special_tokens=False).ids
    expected = plain if bos_id is None else [bos_id, *plain]
    encodes_alike = not is_bos_known or tokenizer.encode(_SAMPLE_TEXT).ids == expected
    random = description["model"].get("dropout")
    if encodes_alike and not (random or description["truncation"] or description["padding"]):
        return None

    description["truncation"] = description["padding"] = None
    if random:
        description["model"]["dropout"] = None
    if not encodes_alike:
        description["post_processor"] = None
    made = Tokenizer.from_str(json.dumps(description))
    if not encodes_alike and bos_id is not None:
        bos = made.id_to_token(bos_id)
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return _indented(made)


def _indented(tokenizer: Tokenizer) -> bytes:
    content: dict[str, Any] = describe(tokenizer)
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
