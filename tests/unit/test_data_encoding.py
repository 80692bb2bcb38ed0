"""Encoding: no special token comes of a text, whatever the tokenizer; what a tokenizer does not take is counted."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.data.corpus.counts import Counts
from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.encoding import Encoder
from pipeline.data.corpus.removed_text import WHITE_SPACE, lost_white_space
from pipeline.data.corpus.tokenization import encode_documents
from pipeline.data.errors import DataError
from pipeline.data.tokenizer import byte_tokenizer, end_of_document_id, for_documents, train_bpe

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("abcdestx0A</>|[]_CLSEPUNKim ▁")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>", "[CLS]", "[SEP]", "[UNK]"]
# Strings that a normaliser turns into those of special tokens: in full width, and in another case.
NORMALIZED = ["".join(chr(ord(letter) + 0xFEE0) for letter in token) for token in ("</s>", "<0x0A>")] + [
    "</S>",
    "[cls]",
    "< /s>",
]
STRINGS = [*SPECIAL, *NORMALIZED, "<0x0A>", "<0xE2>", "<", "\n", "é", "a", " ", "x", "/s>"]


def pieces(special=SPECIAL):
    # Whole special tokens score best, so that the model takes them wherever it can.
    return [(token, 0.0) for token in [*special, *BYTES]] + [(letter, -5.0) for letter in LETTERS]


def unigram(normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(models.Unigram(pieces(), unk_id=0, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def llama_bpe():
    """SentencePiece's BPE as Hugging Face converts it: no pre-tokeniser, byte fallback, and pre-tokens looked up whole."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *BYTES, *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def byte_level_with_plain_added_tokens():
    tokenizer = train_bpe(["abcde <|im_end|> </s> [CLS]"] * 3, 300)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|im_end|>", "</s>", "    ")])
    return tokenizer


def word_piece():
    vocab = {token: number for number, token in enumerate([*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("cls", "CLS")])
    return tokenizer


TOKENIZERS = {
    "unigram": unigram(),
    "unigram, NFKC and lower case": unigram(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), pre_tokenizers.Metaspace()
    ),
    "llama's BPE": llama_bpe(),
    "byte-level BPE": byte_level_with_plain_added_tokens(),
    "word pieces": word_piece(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.sampled_from(STRINGS), min_size=1, max_size=8).map("".join))
def test_no_special_token_comes_of_any_text(name, text):
    tokenizer = TOKENIZERS[name]
    end = tokenizer.token_to_id("</s>")
    special = {tokenizer.token_to_id(token) for token in SPECIAL if token not in ("<unk>", "[UNK]")} - {None}
    (encoded,) = Encoder(tokenizer, end).encode([text])
    assert encoded.ids[-1] == end
    assert not special & set(encoded.ids[:-1].tolist())


@given(text=st.lists(st.sampled_from(STRINGS), min_size=1, max_size=8).map("".join))
def test_a_text_of_special_strings_comes_back_from_its_ids(text):
    tokenizer = TOKENIZERS["unigram"]
    (encoded,) = Encoder(tokenizer, tokenizer.token_to_id("</s>")).encode([text])
    assert tokenizer.decode(encoded.ids[:-1].tolist(), skip_special_tokens=False) == text


def test_ordinary_text_has_the_ids_of_the_tokenizer_itself():
    tokenizer = byte_level_with_plain_added_tokens()
    texts = ["abc de", "a    b", "é\n<td>", "x" * 30]
    found = [encoded.ids[:-1].tolist() for encoded in Encoder(tokenizer, 0).encode(texts)]
    assert found == [tokenizer.encode(text).ids for text in texts]
    assert tokenizer.token_to_id("    ") in found[1]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        *((unigram(), text) for text in ("<0x0A>", "one</s>two", "<unk>")),
        # Declared special, so that it never comes of a text.
        (byte_tokenizer(), "one<|endoftext|>two"),
    ],
)
def test_text_with_the_string_of_a_special_token_is_counted(tokenizer, text):
    counts = Counts(documents=2)
    documents = [Document("a\n", ""), Document(text, "")]
    list(encode_documents(Encoder(tokenizer, end_of_document_id(tokenizer)), documents, counts, "error", str))
    assert (counts.special_text, counts.without_token, counts.documents) == (1, 0, 2)


def test_a_special_token_of_one_character_is_refused_or_its_text_left_out():
    tokenizer = byte_tokenizer()
    encoder, documents = Encoder(tokenizer, ord("A")), [Document("b", "", position=0), Document("cAd", "", position=1)]
    with pytest.raises(DataError, match=r"document 1: the tokenizer makes the special token 'A' out of its text; mend"):
        list(encode_documents(encoder, documents, Counts(), "error", lambda document: f"document {document.position}"))
    counts = Counts(documents=2)
    ((used, ids),) = encode_documents(encoder, documents, counts, "skip", lambda document: "there")
    assert ([document.text for document in used], ids[0].tolist()) == (["b"], [98, 65])
    assert (counts.documents, counts.undecodable) == (1, 1)
    assert counts.notes == ["there: the tokenizer makes the special token 'A' out of its text"]


def panicking():
    tokenizer = byte_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), tokenizer.pre_tokenizer]
    )
    return tokenizer, "a" * 40 + "b", "retry-limit"


def without_unknown():
    return Tokenizer(models.WordLevel({"</s>": 0, "b": 1}, unk_token="u")), "zz", "Missing \\[UNK\\]"


@pytest.mark.parametrize("make", [panicking, without_unknown])
def test_a_tokenizer_that_raises_is_one_message_or_counted(make):
    tokenizer, bad, message = make()
    documents = [Document(text, "") for text in ("b", bad, "b")]
    with pytest.raises(DataError, match=f"here: the tokenizer cannot encode it: .*{message}"):
        list(encode_documents(Encoder(tokenizer, 0), documents, Counts(), "error", lambda document: "here"))
    counts = Counts(documents=3)
    ((used, _),) = encode_documents(Encoder(tokenizer, 0), documents, counts, "skip", lambda document: "here")
    assert [document.text for document in used] == ["b", "b"]
    assert (counts.documents, counts.undecodable, len(counts.notes)) == (2, 1, 1)


def dropping():
    """A BPE of three letters, which drops all others in silence."""
    return Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))


def dropping_in_words():
    """A BPE that has some letters at the end of a word only, and drops all others in silence."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "a.": 1, "b.": 2, "</s>": 3}, [], end_of_word_suffix="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def dropping_after_a_space():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "▁": 2, "</s>": 3}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "lost"),
    [
        (dropping(), "aéb", "é"),
        (dropping_after_a_space(), "aéb", "é"),
        (dropping_in_words(), "aba", "b"),
        (dropping_in_words(), "aab", ""),
        (dropping(), "ab \n", ""),
        (Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -1.0)], unk_id=0)), "aéa", "<unk>"),
        (byte_tokenizer(), "aé漢😀\x00", ""),
        (TOKENIZERS["unigram"], "aé漢😀\x00", ""),
    ],
)
def test_characters_without_a_token_are_counted_and_named(tokenizer, text, lost):
    counts = Counts(documents=1)
    encoder = Encoder(tokenizer, tokenizer.token_to_id("</s>") or 256)
    list(encode_documents(encoder, [Document(text, "")], counts, "error", lambda document: "here"))
    assert counts.without_token == bool(lost)
    assert counts.warnings == ([f"here: the tokenizer has no token for {lost!r}"] if lost else [])


def removing(normalizer=None, pre_tokenizer=None):
    """A tokenizer that has a token for every character of the tests, and removes some of them."""
    vocab = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -2.0) for letter in "abcdefx▁1234 ,-\n½é漢字")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return tokenizer


NUMBERS = Regex("[0-9]+")
WORDS = Regex(r"\w+|[^\s\w]+")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "text", "lost"),
    [
        # In context: each of their characters has a token where it stands by itself.
        (normalizers.Replace("ab", ""), None, "xabc", "ab"),
        (normalizers.Replace("ab", ""), None, "xa bc", ""),
        (normalizers.Replace("ab", " "), None, "xabc", "ab"),
        (normalizers.Replace(Regex("[ab]{2}"), " "), None, "xabc  ", "ab"),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("f", "")]), None, "ﬀ x", "ﬀ"),
        (None, pre_tokenizers.Split("ab", "removed"), "xabc", "ab"),
        (None, pre_tokenizers.Split("ab", "removed"), "xbac", ""),
        (None, pre_tokenizers.Split(Regex("a(?=b)"), "removed"), "ab ac", "a"),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Split(",", "removed"), pre_tokenizers.Metaspace()]), "a,b -", ","),
        (None, pre_tokenizers.Split(Regex("a+"), "removed", invert=True), "aabca", "bc"),
        (None, pre_tokenizers.CharDelimiterSplit("-"), "a-b", "-"),
        (None, pre_tokenizers.Punctuation("removed"), "a,b", ","),
        # A character at a time.
        (normalizers.Replace(NUMBERS, ""), pre_tokenizers.Whitespace(), "a12 34 b", "1234"),
        (normalizers.Replace(NUMBERS, " "), pre_tokenizers.Whitespace(), "a12 34 b", "1234"),
        # White space, accents and control characters are removed by intent.
        (normalizers.Strip(), None, " \n ab \n", ""),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]), None, "ex\u0301 x", ""),
        (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), "a\u200b  b\x00\n漢字 é", ""),
        (normalizers.Replace(Regex(r"\s+"), " "), pre_tokenizers.Split(WORDS, "removed", invert=True), "a  b, c\n", ""),
        (None, pre_tokenizers.Split(" ", "removed"), "a b", ""),
        (None, pre_tokenizers.Metaspace(), " a  b", ""),
    ],
)
def test_text_that_is_removed_in_its_context_is_counted_and_named(normalizer, pre_tokenizer, text, lost):
    (encoded,) = Encoder(removing(normalizer, pre_tokenizer), 1).encode([text])
    assert encoded.lost == lost


@settings(deadline=None, max_examples=60)
@given(text=st.text("ab-1 é漢\u0301\n▁😀", max_size=12))
def test_a_tokenizer_that_keeps_all_text_is_never_said_to_remove_some(text):
    byte_level = byte_tokenizer()
    split = pre_tokenizers.Split(WORDS, "removed", invert=True)
    byte_level.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    normalized = unigram(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("zz", "")]), pre_tokenizers.Metaspace())
    for tokenizer, end in ((byte_level, 256), (normalized, 2)):
        (encoded,) = Encoder(tokenizer, end).encode([text])
        assert encoded.lost == ""


@pytest.mark.parametrize(
    ("tokenizer", "lost"),
    [
        (byte_tokenizer(), []),
        (llama_bpe(), []),
        (removing(None, pre_tokenizers.Metaspace()), []),
        (removing(normalizers.Strip()), ["white space before the first word", "white space after the last word"]),
        (removing(None, pre_tokenizers.Whitespace()), list(WHITE_SPACE.values())),
        (removing(normalizers.Replace("\n", " ")), ["line ends"]),
    ],
)
def test_white_space_that_a_tokenizer_does_not_keep_is_listed(tokenizer, lost):
    assert lost_white_space(tokenizer) == lost


def test_a_document_without_any_token_is_left_out_and_counted():
    counts = Counts(documents=2)
    documents = [Document("xyz", ""), Document("ab", "")]
    ((used, ids),) = encode_documents(Encoder(dropping(), 2), documents, counts, "error", lambda document: "here")
    assert ([document.text for document in used], ids[0].tolist()) == (["ab"], [0, 1, 2])
    assert (counts.documents, counts.empty) == (1, 1)
    assert re.fullmatch("here: the tokenizer has no token for any of its 3 characters", counts.notes[0])


def test_merges_are_not_dropped_at_random():
    tokenizer = train_bpe(["abcabc abcabc"] * 9, 270)
    expected = tokenizer.encode("abcabc abc").ids
    tokenizer.model.dropout = 0.9
    encoder = Encoder(tokenizer, 0)
    assert all(each.ids[:-1].tolist() == expected for each in encoder.encode(["abcabc abc"] * 20))
    assert tokenizer.model.dropout == pytest.approx(0.9)
    assert json.loads(for_documents(tokenizer).to_str())["model"]["dropout"] is None


def test_the_bos_token_comes_first_and_only_there():
    encoder = Encoder(unigram(), 2, 1)
    (encoded,) = encoder.encode(["a<s>"])
    assert (encoded.ids[0], encoded.ids[-1], np.count_nonzero(encoded.ids == 1)) == (1, 2, 1)
