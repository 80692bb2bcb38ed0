"""The tokens around documents are those that a tokenizer's folder declares; a tokenizer's identity is all that decides ids."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.checks import check_data
from pipeline.config import ConfigError, Settings
from pipeline.data.corpus.inputs import Input
from pipeline.data.corpus.panics import without_panics
from pipeline.data.corpus.prepare import PrepareSettings
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import DataSet, join
from pipeline.data.shards.adoption import index
from pipeline.data.shards.manifest import read_manifest, tokenizer_difference, write_manifest
from pipeline.data.shards.merging import merge
from pipeline.data.shards.reader import ShardReader
from pipeline.data.special_tokens import declaration, declared_bos_id, special_tokens
from pipeline.data.tokenizer import find_tokenizer, fingerprint, identity, load_tokenizer, train_bpe
from tests.unit.test_data_command_lines import ROOT, run

BEGIN, END, TURN = "<s>", "</s>", "<|im_end|>"
TEXTS = ["the cat sat", "the dog sat on the mat", "a bird"]


def tokenizer():
    """Ids: <|endoftext|> 0, then 269 more; <s> 270, </s> 271, <|im_end|> 272."""
    made = train_bpe(TEXTS * 9, 270)
    made.add_special_tokens([BEGIN, END, TURN])
    return made


def folder(path, made=None, **files):
    path.mkdir(exist_ok=True)
    (made or tokenizer()).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def with_template(single, names=(BEGIN, END)):
    made = tokenizer()
    template = processors.TemplateProcessing(single=single, special_tokens=[(name, made.token_to_id(name)) for name in names])
    made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return made


def prepared(tmp_path, name, *arguments):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / name, "--sequence-length", 32, "--processes", 1]
    return run("prepare", *options, *arguments)


def documents(directory):
    manifest = read_manifest(directory)
    reader = ShardReader(directory, manifest)
    rows = [reader.read(shard, row) for shard, entry in enumerate(manifest.shards) for row in range(entry.samples)]
    return [part.tolist() for row in rows for part in np.split(row.tokens, row.lengths.cumsum())[:-1]]


# The end of documents.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("<|endoftext|>", "by its usual name")),
        ({"tokenizer_config": {"eos_token": END}}, (END, "tokenizer_config.json")),
        (
            {"tokenizer_config": {"eos_token": {"content": TURN}}, "config": {"eos_token_id": 272}},
            (TURN, "tokenizer_config.json"),
        ),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 271}}, (END, "config.json")),
        ({"generation_config": {"eos_token_id": [272, 271]}, "config": {"eos_token_id": 271}}, (END, "generation_config.json")),
        (
            {"tokenizer_config": {"eos_token": TURN}, "generation_config": {"eos_token_id": [271, 272]}},
            (TURN, "tokenizer_config.json"),
        ),
    ],
)
def test_the_end_of_documents_is_what_the_folder_declares(tmp_path, files, expected):
    found = special_tokens(tokenizer(), folder(tmp_path / "model", **files))
    assert (found.end_of_document, found.end_from) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"eos_token": END}, "config": {"eos_token_id": 2}},
            "tokenizer_config.json says '</s>'; config.json",
        ),
        (
            {"generation_config": {"eos_token_id": [271, 272]}},
            "several end-of-document tokens .*choose one with --end-of-document",
        ),
        ({"config": {"eos_token_id": 4000}}, "names 4000 as the id of a special token, but the tokenizer has no such id"),
        ({"config": {"eos_token_id": "2"}}, "names '2' as the id"),
        ({"config": {"eos_token_id": True}}, "names True as the id"),
        ({"tokenizer_config": {"eos_token": "<halt>"}}, "eos_token is '<halt>', but the tokenizer has no such token"),
        ({"tokenizer_config": {"eos_token": 7}}, "expected a token in eos_token, got 7"),
        ({"generation_config": "[1]"}, "expected a JSON object, got list"),
    ],
)
def test_declarations_that_contradict_or_cannot_be_are_errors_unless_a_token_is_named(tmp_path, files, message):
    model = folder(tmp_path / "model", **files)
    with pytest.raises(DataError, match=message):
        special_tokens(tokenizer(), model)
    assert special_tokens(tokenizer(), model, TURN, "never").end_of_document_id == 272


def test_a_named_end_is_never_replaced_by_another(tmp_path):
    model = folder(tmp_path / "model", tokenizer_config={"eos_token": END})
    for named in ("<halt>", ""):
        with pytest.raises(DataError, match=f"the tokenizer has no token '{named}' to end documents with"):
            special_tokens(tokenizer(), model, named)


def test_prepare_and_index_take_the_declared_end_however_the_tokenizer_is_given_and_print_it(tmp_path, capsys):
    model = folder(tmp_path / "model", tokenizer_config={"eos_token": END})
    for number, given in enumerate((model, model / "tokenizer.json")):
        assert prepared(tmp_path, f"out{number}", "--tokenizer", given) == 0
        assert f"documents end with {END!r} (id 271, tokenizer_config.json)" in capsys.readouterr().out
        assert {document[-1] for document in documents(tmp_path / f"out{number}")} == {271}
    assert prepared(tmp_path, "named", "--tokenizer", model, "--end-of-document", TURN) == 0
    assert read_manifest(tmp_path / "named").end_of_document_id == 272

    adopted = shutil.copytree(tmp_path / "out0", tmp_path / "adopted", ignore=shutil.ignore_patterns("manifest.json"))
    assert run("shards", "index", adopted, "--tokenizer", model / "tokenizer.json") == 0
    assert read_manifest(adopted).end_of_document_id == 271
    assert "documents end with '</s>' (id 271, tokenizer_config.json)" in capsys.readouterr().out


def test_a_prepared_folder_and_a_folder_of_prepared_splits_are_tokenizers_with_their_ends(tmp_path, capsys):
    model = folder(tmp_path / "model", with_template(f"{BEGIN} $A"), tokenizer_config={"eos_token": END})
    assert prepared(tmp_path, "both", "--tokenizer", model, "--validation", 0.5) == 0
    assert prepared(tmp_path, "again", "--tokenizer", tmp_path / "both") == 0
    assert tokenizer_difference(read_manifest(tmp_path / "again"), read_manifest(tmp_path / "both" / "train")) is None
    assert read_manifest(tmp_path / "again").end_of_document_id == 271
    assert prepared(tmp_path, "turned", "--tokenizer", model, "--bos", "never", "--end-of-document", TURN) == 0
    found = special_tokens(load_tokenizer(tmp_path / "turned"), tmp_path / "turned")
    assert (found.end_of_document, found.bos) == (TURN, None)

    # A folder of folders that do not go together.
    with pytest.raises(DataError, match="documents that begin or end with different tokens; name one of"):
        find_tokenizer(tmp_path)
    train_bpe(["others"], 290).save(str(tmp_path / "both" / "train" / "tokenizer.json"))
    with pytest.raises(DataError, match="have different tokenizers, or documents that"):
        find_tokenizer(tmp_path / "both")


# The beginning.


@pytest.mark.parametrize(
    ("made", "config", "rule", "bos"),
    [
        (tokenizer(), {}, "auto", None),
        (tokenizer(), {"add_bos_token": True, "bos_token": BEGIN}, "auto", BEGIN),
        (tokenizer(), {"add_bos_token": False, "bos_token": BEGIN}, "auto", None),
        (tokenizer(), {"bos_token": BEGIN}, "auto", None),
        (tokenizer(), {"bos_token": TURN}, "always", TURN),
        (tokenizer(), {}, "always", BEGIN),
        (with_template(f"{BEGIN} $A {END}"), {}, "auto", BEGIN),
        (with_template(f"$A {END}"), {}, "auto", None),
        (with_template(f"{BEGIN} $A"), {}, "never", None),
        (with_template(f"{BEGIN} $A"), {"add_bos_token": False}, "auto", None),
    ],
)
def test_bos_follows_the_rule_the_config_and_the_post_processor(tmp_path, made, config, rule, bos):
    model = folder(tmp_path / "model", made, tokenizer_config={"eos_token": TURN} | config if bos != TURN else config)
    found = special_tokens(load_tokenizer(model), model, None, rule)
    assert (found.bos, found.bos_id) == (bos, bos and made.token_to_id(bos))


@pytest.mark.parametrize(
    ("made", "config", "message"),
    [
        (with_template(f"{BEGIN} $A"), {"bos_token": TURN}, "name different BOS tokens, '<s>' and '<|im_end|>'"),
        (with_template(f"{END} $A"), {"eos_token": END}, "is also the one that ends documents"),
        (with_template(f"{BEGIN} {END} $A"), {}, "puts several tokens before a text, <s>, </s>"),
        (train_bpe(TEXTS, 290), {"add_bos_token": True}, "has no BOS token"),
    ],
)
def test_a_bos_token_that_cannot_be_is_an_error_that_never_avoids(tmp_path, made, config, message):
    model = folder(tmp_path / "model", made, tokenizer_config=config)
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        special_tokens(made, model)
    assert special_tokens(made, model, None, "never").bos is None


def test_documents_begin_with_bos_once_whatever_their_rows_and_the_manifest_says_so(tmp_path):
    model = folder(tmp_path / "model", with_template(f"{BEGIN} $A"), tokenizer_config={"eos_token": END})
    plain = tokenizer()
    assert prepared(tmp_path, "out", "--tokenizer", model, "--packing", "best_fit") == 0
    expected = sorted([270, *plain.encode(text, add_special_tokens=False).ids, 271] for text in TEXTS)
    assert sorted(documents(tmp_path / "out")) == expected
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bos"] == {"rule": "auto", "id": 270}
    assert prepared(tmp_path, "without", "--tokenizer", model, "--bos", "never") == 0
    assert json.loads((tmp_path / "without" / "manifest.json").read_text())["bos"] == {"rule": "never"}
    assert sorted(documents(tmp_path / "without")) == sorted(document[1:] for document in expected)


# Others that the folder declares.

DECLARATIONS = {
    "tokenizer_config": {
        "add_bos_token": False,
        "num_image_token": 256,
        "pad_token": "cat",
        "extra_special_tokens": {"image": "dog"},
        "added_tokens_decoder": {"5": {"content": "bird", "special": True}, "6": {"content": "mat", "special": False}},
    },
    "special_tokens_map": {
        "additional_special_tokens": ["<|endoftext|>", {"content": "\u0120the"}, "not in the tokenizer"],
        "mask_token": "!",
    },
}


def test_tokens_that_only_the_folder_declares_special_are_found(tmp_path):
    made = tokenizer()
    made.add_tokens(["cat", "dog", "bird", "mat"])
    model = folder(tmp_path / "model", made, **DECLARATIONS)
    found = special_tokens(made, model, END)
    assert found.declared == ("bird", "cat", "dog", "\u0120the")
    shown = "; declared special beside the tokenizer: 'bird', 'cat', 'dog', '\u0120the'; declared special, but text too: '!'"
    assert str(found).endswith(shown)
    assert special_tokens(made, None, END).declared == ()
    lists = ("additional_special_tokens", "extra_special_tokens")
    message = r"special_tokens_map\.json(: expected a (list of tokens|token) in| cannot be read)"
    for wrong in ("{", {lists[0]: "cat"}, {lists[0]: [7]}, {lists[1]: 7}):
        with pytest.raises(DataError, match=message):
            special_tokens(made, folder(tmp_path / "wrong", made, special_tokens_map=wrong), END)


def test_no_id_of_a_token_that_only_the_folder_declares_comes_of_a_text(tmp_path, capsys):
    made = tokenizer()
    made.add_tokens(["cat"])
    declared = {"pad_token": "cat", "mask_token": "\u0120the"}
    model = folder(tmp_path / "model", made, tokenizer_config={"eos_token": END, **declared})
    forbidden = {made.token_to_id(token) for token in declared.values()}
    assert forbidden <= {token_id for text in TEXTS for token_id in made.encode(text).ids}
    # From the model's folder, from what was made with it, and from that once it was merged of parts.
    assert prepared(tmp_path, "first", "--tokenizer", model) == 0
    assert prepared(tmp_path, "again", "--tokenizer", tmp_path / "first", "--seed", 2) == 0
    merge([tmp_path / "first", tmp_path / "again"], tmp_path / "merged")
    assert prepared(tmp_path, "last", "--tokenizer", tmp_path / "merged") == 0
    assert capsys.readouterr().out.count("2 documents with the string of a special token in their text") == 3
    for name in ("first", "again", "last"):
        assert not forbidden & {token_id for document in documents(tmp_path / name) for token_id in document}
        assert sorted(made.decode(document[:-1]) for document in documents(tmp_path / name)) == sorted(TEXTS)


# Identity.


def lower_cased():
    made = tokenizer()
    made.normalizer = normalizers.Lowercase()
    return made


def split_otherwise():
    made = tokenizer()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def fewer_merges():
    description = json.loads(tokenizer().to_str())
    description["model"]["merges"].pop()
    return Tokenizer.from_str(json.dumps(description))


def stripping():
    made = train_bpe(TEXTS * 9, 270)
    made.add_special_tokens([BEGIN, AddedToken(END, lstrip=True), TURN])
    return made


@pytest.mark.parametrize("other", [lower_cased, split_otherwise, fewer_merges, stripping])
def test_a_tokenizers_identity_is_all_that_decides_ids(tmp_path, other):
    assert fingerprint(other()) == fingerprint(tokenizer())
    assert identity(other()) != identity(tokenizer())
    for name, made in (("a", tokenizer()), ("b", other())):
        prepare_here(tmp_path, name, made)
    with pytest.raises(DataError, match="do not belong together: tokenizer_identity is"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    sets = [DataSet(name, tmp_path / name, 1.0) for name in ("a", "b")]
    with pytest.raises(DataError, match=r"prepared with another tokenizer than .*tokenizer_identity"):
        join([read_manifest(tmp_path / name) for name in ("a", "b")], sets)
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(DataError, match="is another tokenizer than the one given"):
        index(tmp_path / "b", tokenizer())


def test_what_preparing_turns_off_and_the_files_layout_are_no_part_of_the_identity():
    made = with_template(f"{BEGIN} $A")
    made.enable_truncation(7)
    made.model.dropout = 0.5
    assert identity(made) == identity(tokenizer()) == identity(Tokenizer.from_str(tokenizer().to_str(pretty=True)))


def prepare_here(tmp_path, name, made, **changes):
    (tmp_path / "in.txt").write_text(" ".join([*TEXTS, name]))
    settings = PrepareSettings(8, **{"end_of_document": END, **changes})
    return prepare_files([Input("", str(tmp_path / "in.txt"))], tmp_path / name, made, settings)


def test_folders_in_which_a_text_may_and_may_not_become_a_token_do_not_mix(tmp_path):
    prepare_here(tmp_path, "a", tokenizer())
    prepare_here(tmp_path, "b", tokenizer(), special=("cat",))
    with pytest.raises(DataError, match="do not belong together: 'cat': declared special beside the tokenizer of one"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    prepare_here(tmp_path, "c", tokenizer(), special=("cat",))
    (merged,) = merge([tmp_path / "b", tmp_path / "c"], tmp_path / "merged").values()
    assert merged.preparation.special == ("cat",)


def test_folders_with_and_without_bos_do_not_mix_and_older_manifests_are_compared_by_what_they_have(tmp_path):
    prepare_here(tmp_path, "a", tokenizer())
    prepare_here(tmp_path, "b", tokenizer(), bos=BEGIN, bos_rule="always")
    first, second = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert tokenizer_difference(first, second) == "the BOS token's id is None in one and 270 in the other"
    write_manifest(tmp_path / "a", first.model_copy(update={"bos": None, "tokenizer_identity": None}))
    assert tokenizer_difference(read_manifest(tmp_path / "a"), second) is None
    (merged,) = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged").values()
    assert (merged.bos, merged.tokenizer_identity) == (None, None)

    # One that does not tell hides no difference between two others.
    prepare_here(tmp_path, "c", tokenizer())
    names = ("a", "b", "c")
    with pytest.raises(DataError, match=r"b and .*c do not belong together: the BOS token's id is 270 in one and None"):
        merge([tmp_path / name for name in names], tmp_path / "again")
    with pytest.raises(DataError, match=r"c was prepared with another tokenizer than .*b \(the BOS token's id"):
        join([read_manifest(tmp_path / name) for name in names], [DataSet(tmp_path / name, 1.0, name) for name in names])


def test_folders_whose_documents_end_with_different_tokens_do_not_mix(tmp_path):
    for name, end in (("a", END), ("b", TURN)):
        prepare_here(tmp_path, name, tokenizer(), end_of_document=end)
    manifests = [read_manifest(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(DataError, match="do not belong together: documents end with id 271 in one and 272 in the other"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    with pytest.raises(DataError, match=r"prepared with another tokenizer than .*documents end with id 271"):
        join(manifests, [DataSet(tmp_path / name, 1.0, name) for name in ("a", "b")])


@pytest.mark.parametrize(
    ("normalizer", "template", "config", "problem"),
    [
        (None, None, {}, None),
        (normalizers.Lowercase(), None, {}, "makes other ids out of a text: its normaliser"),
        (
            None,
            "<|endoftext|> $A",
            {},
            r"begins a text with '<\|endoftext\|>' \(id 0\), the data's documents begin with no BOS",
        ),
        (None, "<|endoftext|> $A", {"add_bos_token": False}, None),
        (None, None, {"add_bos_token": True, "bos_token": 7}, "expected a token in bos_token, got 7"),
    ],
)
def test_the_references_tokenizer_is_compared_with_the_data(
    tmp_path, tiny_data, tiny_reference, normalizer, template, config, problem
):
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    made = load_tokenizer(reference)
    if normalizer is not None:
        made.normalizer = normalizer
    if template is not None:
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|endoftext|>", 0)])
    folder(reference, made, tokenizer_config=config)
    sizes = {"sequence_length": 16, "global_batch": 2, "micro_batch": 1}
    settings = Settings().with_values(data={"path": tiny_data / "train", **sizes}, reference={"path": reference})
    if problem is None:
        check_data(settings)
        return
    with pytest.raises(ConfigError, match=problem):
        check_data(settings)


def test_a_pretrained_model_is_not_trained_on_the_ids_of_another_tokenizer(tmp_path, tiny_data, tiny_reference):
    pretrained = shutil.copytree(tiny_reference, tmp_path / "pretrained")
    sizes = {"sequence_length": 16, "global_batch": 2, "micro_batch": 1}
    settings = Settings().with_values(
        data={"path": tiny_data / "train", **sizes},
        model={"pretrained": pretrained, "dim": 16, "num_layers": 2, "num_attention_heads": 2},
        training={"k_percent": 1.0},
    )
    check_data(settings)

    # Merges in another order: as many ids, which mean the same, and other ids for a text.
    content = json.loads((pretrained / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (pretrained / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model\.pretrained: the tokenizer of .* makes other ids out of a text.*or take its"):
        check_data(settings)
    (pretrained / "tokenizer.json").unlink()
    check_data(settings)
    # One that cannot be compared before it is converted.
    (pretrained / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"tokenizer of .* cannot be used: .* is SentencePiece's. Write tokenizer.json beside"
    ):
        check_data(settings)


def test_an_older_manifest_does_not_hide_how_the_documents_of_another_set_begin(tmp_path, tiny_data, tiny_reference):
    older = shutil.copytree(tiny_data / "train", tmp_path / "older")
    write_manifest(older, read_manifest(older).model_copy(update={"bos": None, "tokenizer_identity": None}))
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    made = load_tokenizer(reference)
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    folder(reference, made, tokenizer_config={})
    mixture = [{"path": path, "weight": 1, "name": path.name} for path in (older, tiny_data / "train")]
    sizes = {"sequence_length": 16, "global_batch": 2, "micro_batch": 1}
    settings = Settings().with_values(data={"mixture": mixture, **sizes}, reference={"path": reference})
    with pytest.raises(ConfigError, match="begins a text with"):
        check_data(settings)


def test_an_exported_model_declares_the_ends_that_its_data_has(tmp_path):
    made = with_template(f"{BEGIN} $A")
    for is_known, bos_id, expected in ((True, None, None), (True, 270, 270), (False, None, 270)):
        content = declaration(made.to_str().encode(), 271, is_known, bos_id)
        model = folder(tmp_path / "model", made, tokenizer_config=content.decode())
        assert declared_bos_id(made, model) == expected
        assert special_tokens(made, model).end_of_document_id == 271


def test_a_text_that_the_tokenizer_cannot_encode_is_named_by_file_and_place(tmp_path, capsys):
    (tmp_path / "words.json").write_text(Tokenizer(models.WordLevel({END: 0, "the cat sat": 1, "a bird": 2}, "none")).to_str())
    options = ["--tokenizer", tmp_path / "words.json", "--on-undecodable"]
    assert prepared(tmp_path, "strict", *options, "error") == 2
    place = f"{tmp_path / 'in.jsonl'}, document at byte 24: the tokenizer cannot encode it: WordLevel error: Missing [UNK]"
    assert capsys.readouterr().err.startswith(f"error: {place}")
    assert not (tmp_path / "strict").exists()
    assert prepared(tmp_path, "lenient", *options, "skip") == 0
    output = capsys.readouterr()
    assert "2 documents; 1 undecodable left out" in output.out
    assert f"left out: {place}" in output.err
    assert sorted(documents(tmp_path / "lenient")) == [[1, 0], [2, 0]]


@pytest.mark.parametrize(("processes", "rule"), [("1", "error"), ("3", "skip")])
def test_a_tokenizer_that_panics_is_one_message_and_nothing_else(tmp_path, processes, rule):
    made = train_bpe(TEXTS, 270)
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
    made.save(str(tmp_path / "panicking.json"))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a" * 40 + "b"}) + '\n{"text": "good"}\n')
    options = ["--input", "in.jsonl", "--tokenizer", "panicking.json", "--sequence-length", "4", "--output", "out"]
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare.py"),
        *options,
        "--processes",
        processes,
        "--on-undecodable",
        rule,
    ]
    environment = os.environ | {"RUST_BACKTRACE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == (2 if rule == "error" else 0)
    (line,) = done.stderr.splitlines()
    what = "error" if rule == "error" else "left out"
    assert line.startswith(f"{what}: in.jsonl, document at byte 0: the tokenizer cannot encode it: Onig: Regex search error")


@contextmanager
def standard_error_in(path):
    """Write the process's standard error to a file, which can be read while threads write to it."""
    real = os.dup(2)
    with path.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)


def test_what_is_no_panic_is_shown_as_it_comes(tmp_path):
    standard_error = tmp_path / "standard_error"
    panic = b"\nthread '<unnamed>' (35) panicked at /a/lib.rs:647:23:\nOnig: error\n"
    with standard_error_in(standard_error), without_panics():
        for written in (b"first\n\n", panic + b"note: run with `RUST_BACKTRACE=1` environment variable\n", panic, b"second\n"):
            os.write(2, written)
        ends = time.monotonic() + 300
        while b"second" not in standard_error.read_bytes() and time.monotonic() < ends:
            time.sleep(0.01)
        assert standard_error.read_bytes() == b"first\n\nsecond\n"
        os.write(2, panic + b"not ended")
    assert standard_error.read_bytes() == b"first\n\nsecond\nnot ended"


def test_what_has_no_token_or_is_the_string_of_one_is_counted_in_summary_and_manifest(tmp_path, capsys):
    vocab = {token: number for number, token in enumerate([END, "<unk>", *"abcdefghijklmnopqr tu</>s"])}
    (tmp_path / "letters.json").write_text(Tokenizer(models.Unigram([(t, -1.0) for t in vocab], unk_id=1)).to_str())
    (tmp_path / "in.txt").write_text(f"a text with {END} and é")
    arguments = ["--input", tmp_path / "in.txt", "--tokenizer", tmp_path / "letters.json", "--sequence-length", 16]
    assert run("prepare", *arguments, "--output", tmp_path / "out", "--processes", 1) == 0
    output = capsys.readouterr()
    assert "1 documents with the string of a special token in their text, encoded as text" in output.out
    assert "warning: 1 documents have characters that the tokenizer has no token for" in output.err
    assert f"warning: {tmp_path / 'in.txt'}: the tokenizer has no token for '<unk>'" in output.err
    counts = read_manifest(tmp_path / "out").preparation.input
    assert (counts.documents, counts.special_text, counts.without_token) == (1, 1, 1)


@pytest.mark.parametrize("given", ["", "tokenizer.model", "tokenizer.json"])
def test_a_sentencepiece_model_alone_is_refused_with_the_command_that_converts_it(tmp_path, given):
    tmp_path = tmp_path / "o'brien's model"
    tmp_path.mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"is SentencePiece's. Write tokenizer.json beside it, once: pip install .*TokenizersBackend .*legacy=True",
    ) as refused:
        load_tokenizer(tmp_path / given)
    # As a shell reads it, the command is Python that names the folder.
    program = shlex.split(str(refused.value).partition("then python ")[2])[1]
    assert str(tmp_path) in {node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)}
