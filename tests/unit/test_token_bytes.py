"""The bytes of a text's tokens add up to the bytes of the text, or are said to be unknown."""

import json
import random
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline.data.token_bytes import NO_TEXT, UNKNOWN, TokenBytes, bytes_of_tokens
from pipeline.data.tokenizer import byte_tokenizer, for_documents, train_bpe, vocab_size

SAMPLE = [
    "the cat sees the dog, 12 times.\n\tdef f(x): return x\n",
    "größer als Ärger — 日本語のテキスト 🙂 e\u0301",
    "a  b   c",
]
SPECIAL = ["<|endoftext|>", "<pad>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained_bpe(normalizer: object = None, pre_tokenizer: object = None, fallback: bool = True, **model: object) -> Tokenizer:
    """A BPE with a token for every byte if `fallback`, with these parts."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, **model))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    special = [*SPECIAL, *(BYTES if fallback else []), *([model["unk_token"]] if "unk_token" in model else [])]
    ascii_letters = [chr(code) for code in range(33, 127)]
    tokenizer.train_from_iterator(
        SAMPLE, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=ascii_letters, show_progress=False)
    )
    # The trainer's tokens for bytes are special: read the model again with the others alone.
    parts = tokenizer.to_str()
    return Tokenizer.from_str(parts) if not fallback else without_special_bytes(parts)


def without_special_bytes(text: str) -> Tokenizer:
    parts = json.loads(text)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(parts))


def llama() -> Tokenizer:
    mark = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return trained_bpe(normalizers.Sequence(mark), unk_token="<unk>", fuse_unk=True)


def gemma() -> Tokenizer:
    return trained_bpe(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), unk_token="<unk>")


def mistral() -> Tokenizer:
    return trained_bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def qwen() -> Tokenizer:
    tokenizer = train_bpe(SAMPLE * 3, 400)
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(r"\p{N}|\s+|[^\s\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def roberta() -> Tokenizer:
    tokenizer = train_bpe(SAMPLE * 3, 400)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unigram() -> Tokenizer:
    letters = sorted({letter for text in SAMPLE for letter in text.replace(" ", "▁")} | {"▁the", "▁cat", "größer"})
    pieces = [("<unk>", 0.0), ("<|endoftext|>", 0.0), *((byte, -20.0) for byte in BYTES), *((each, -3.0) for each in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"<|endoftext|>": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def without(token: str, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with neither this token nor those merged from it."""
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    model["vocab"] = {each: number for each, number in model["vocab"].items() if token not in each}
    model["merges"] = [pair for pair in model["merges"] if token not in "".join(pair)]
    return Tokenizer.from_str(json.dumps(parts))


def measured(tokenizer: Tokenizer) -> TokenBytes:
    return bytes_of_tokens(tokenizer, tokenizer.token_to_id("<|endoftext|>"), vocab_size(tokenizer))


def random_texts() -> list[str]:
    draw = random.Random(0)
    letters = "abcdefgh THE\n\t.,;0123456789äöüßéλжש漢字🙂\u200d\u00a0'"
    return [*SAMPLE, *("x" + "".join(draw.choices(letters, k=draw.randrange(1, 60))) for _ in range(200))]


@pytest.mark.parametrize(
    "make", [byte_tokenizer, lambda: train_bpe(SAMPLE * 3, 400), qwen, llama, gemma, mistral, roberta, unigram]
)
def test_the_bytes_of_a_texts_tokens_add_up_to_the_texts(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    found = measured(tokenizer)
    assert found.unknown is None
    encoder = for_documents(tokenizer)
    for text in random_texts():
        text = unicodedata.normalize("NFC", text) if make is qwen else text
        lengths = found.lengths_V[encoder.encode(text, add_special_tokens=False).ids]
        assert lengths.min() > 0, text
        assert lengths.sum() - found.opens_with_space == len(text.encode()), text


def test_a_part_of_a_character_counts_its_own_bytes() -> None:
    assert measured(byte_tokenizer()).lengths_V.tolist() == [1] * 256 + [NO_TEXT]
    tokenizer = llama()
    assert {measured(tokenizer).lengths_V[tokenizer.token_to_id(byte)] for byte in BYTES} == {1}


def test_the_end_of_a_document_and_special_tokens_stand_for_no_text() -> None:
    tokenizer = llama()
    found = measured(tokenizer)
    assert [found.lengths_V[tokenizer.token_to_id(token)] for token in SPECIAL] == [NO_TEXT] * 2


def test_unknown_text_ids_without_a_token_and_tokens_that_take_spaces_along_are_not_known() -> None:
    tokenizer = qwen()
    tokenizer.add_tokens([AddedToken("<think>", lstrip=True), AddedToken("<tool>")])
    found = bytes_of_tokens(tokenizer, 0, vocab_size(tokenizer) + 3)
    assert [found.lengths_V[tokenizer.token_to_id(token)] for token in ("<think>", "<tool>")] == [UNKNOWN, len("<tool>")]
    assert found.lengths_V[-3:].tolist() == [UNKNOWN] * 3
    tokenizer = llama()
    assert measured(tokenizer).lengths_V[tokenizer.token_to_id("<unk>")] == UNKNOWN


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (bert, "model of type WordPiece"),
        (lambda: trained_bpe(normalizers.Lowercase()), "normalizer Lowercase"),
        (lambda: trained_bpe(normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])), "normalizer Strip"),
        (lambda: trained_bpe(normalizers.Replace("a", "b")), "normalizer Replace"),
        (lambda: trained_bpe(None, pre_tokenizers.Whitespace()), "pre-tokenizer Whitespace"),
        (lambda: trained_bpe(None, pre_tokenizers.Split(" ", "removed")), "pre-tokenizer Split"),
        (
            lambda: Tokenizer(models.BPE({"<|endoftext|>": 0, "a</w>": 1}, [], end_of_word_suffix="</w>")),
            "marks the parts of words",
        ),
        (lambda: trained_bpe(fallback=False), "drops characters"),
        # openai/parameter-golf issue 897: three tokens of a byte each for every space.
        (lambda: without("▁", llama()), "spells ▁, its mark for the space, in bytes"),
        (
            lambda: trained_bpe(
                None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
            ),
            "puts a space before every part",
        ),
    ],
)
def test_a_tokenizer_whose_tokens_do_not_tell_their_bytes_says_why(make: Callable[[], Tokenizer], why: str) -> None:
    found = measured(make())
    assert why in (found.unknown or "")
    assert np.all(found.lengths_V == UNKNOWN)
