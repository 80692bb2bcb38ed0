"""launch/generate.py: the same tokens with and without speculation, figures beside them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.generate import main
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.tokenizer import load_tokenizer
from pipeline.generation.prompts import TextStream
from pipeline.generation.report import COUNTED
from pipeline.model.export import save_model
from tests.saved_models import SEQUENCE_LENGTH, model_of, write_checkpoint

PROMPT = "the cat sees"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    vocab_size = read_manifest(tiny_data / "train").vocab_size
    write_checkpoint(run_dir, model_of(vocab_size, seed=4), 6, tiny_data / "train", ranks=3)
    return run_dir


def generated(run: Path, directory: Path, *options: str) -> dict[str, Any]:
    """What the command writes with these options."""
    file = directory / "figures.json"
    assert main([str(run), *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_speculation_changes_no_token_and_is_shown_beside_plain_decoding(run, tmp_path, capsys) -> None:
    options = ["--prompt", PROMPT, "--prompt", "0", "--max-tokens", "7"]
    both = generated(run, tmp_path, *options, "--speculate")
    printed = capsys.readouterr().out
    plain = generated(run, tmp_path, *options, "--no-speculate")
    default = generated(run, tmp_path, *options)
    assert both["completions"] == plain["completions"] == default["completions"]
    assert [len(each["token_ids"]) for each in plain["completions"]] == [7, 7]
    assert {"plain", "speculative"} & plain.keys() == {"plain"}
    assert {"plain", "speculative"} & default.keys() == {"speculative"}
    assert both["plain"]["accepted_per_step"] == 1.0
    assert both["speculative"].keys() - both["plain"].keys() == {f"acceptance_head_{head}" for head in (1, 2, 3)}
    assert both["speculative"]["seconds"] > 0

    # The text, a column for each way, and why the tokens of plain decoding are more than its steps.
    assert PROMPT + both["completions"][0]["text"] in printed
    assert printed.splitlines()[-10].split() == ["plain", "speculative"]
    assert printed.splitlines()[-1] == COUNTED
    assert both["plain"]["tokens"] - both["plain"]["steps"] == len(both["completions"])


def test_an_export_continues_as_its_checkpoint_does(run, tmp_path) -> None:
    from launch.export import main as export

    assert export([str(run), str(tmp_path / "export")]) == 0
    options = ["--prompt", PROMPT, "--max-tokens", "6"]
    assert (
        generated(tmp_path / "export", tmp_path, *options)["completions"] == generated(run, tmp_path, *options)["completions"]
    )


def test_prompts_of_a_file_are_continued_a_batch_at_a_time_as_they_are_alone(run, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("the dog\r\n\nthe bird likes the\n0: the\x0bfish\n", encoding="utf-8-sig")
    found = generated(run, tmp_path, "--prompt-file", str(tmp_path / "prompts.txt"), "--batch", "2", "--max-tokens", "5")
    assert [each["prompt"] for each in found["completions"]] == ["the dog", "the bird likes the", "0: the\x0bfish"]
    for each in found["completions"]:
        assert generated(run, tmp_path, "--prompt", each["prompt"], "--max-tokens", "5")["completions"] == [each]


def test_a_completion_ends_at_a_stop_token_or_where_the_context_is_full(run, tmp_path, tiny_data) -> None:
    tokenizer = load_tokenizer(tiny_data)
    (whole,) = generated(run, tmp_path, "--prompt", PROMPT, "--max-tokens", "1000")["completions"]
    ids = whole["token_ids"]
    assert len(tokenizer.encode(PROMPT).ids) + len(ids) == SEQUENCE_LENGTH
    assert whole["finish"] == "length"
    (cut,) = generated(run, tmp_path, "--prompt", PROMPT, "--stop", tokenizer.id_to_token(ids[2]))["completions"]
    assert (cut["token_ids"], cut["finish"]) == (ids[: ids.index(ids[2]) + 1], "stop")


def test_a_stream_prints_the_text_piece_by_piece_and_no_half_character(run, tmp_path, capsys, tiny_data) -> None:
    (found,) = generated(run, tmp_path, "--prompt", PROMPT, "--max-tokens", "6", "--stream")["completions"]
    assert capsys.readouterr().out.startswith(found["text"])
    tokenizer = load_tokenizer(tiny_data)
    stream = TextStream(tokenizer)
    pieces = [stream.add([token_id]) for token_id in tokenizer.encode("naïve — ok").ids]
    assert "".join(pieces) == "naïve — ok"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert stream.rest() == ""

    ids = tokenizer.encode("okï").ids
    cut = TextStream(tokenizer)
    assert [cut.add([token_id]) for token_id in ids[:-1]][-1] == ""
    assert cut.rest() == "\N{REPLACEMENT CHARACTER}"


def test_drawn_tokens_depend_on_the_seed_alone(run, tmp_path) -> None:
    options = ["--prompt", PROMPT, "--max-tokens", "8", "--temperature", "1.5", "--top-p", "0.95"]
    first, again, other = (generated(run, tmp_path, *options, "--seed", seed)["completions"] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "the cat " * 20], "the model was trained on rows of 16; at most 15 leave room for one"),
        (["--prompt", ""], "--prompt: '' has no token, and documents begin without a BOS token"),
        (["--prompt", "x", "--stop", "the cat sees"], "tokens; expected one token"),
        (
            ["--prompt", "x", "--max-tokens", "0", "--temperature", "-1", "--top-p", "0", "--max-token", "5"],
            "4 problems with the options:\n  - --max-tokens: expected a whole number of at least 1, got '0'\n"
            "  - --max-token: unknown option; did you mean '--max-tokens'?\n"
            "  - --temperature: got -1.0; expected a number of at least 0\n  - --top-p: got 0.0; expected a share",
        ),
        (["--prompt", "x", "--top-p", "0.5"], "--top-p: nothing is drawn at temperature 0; add --temperature 1"),
        ([], "--prompt or --prompt-file: got neither; expected one of them"),
        (["--prompt", "x", "--prompt-file", "y"], "got --prompt and --prompt-file; expected one of them"),
        (["--prompt", "x", "--prompt", "y", "--stream"], "--stream: got 2 prompts; expected one"),
        (["--prompt-file", "/nowhere"], "/nowhere: No such file or directory; check the path"),
        (["--prompt", "x", "--json", "/nowhere/file"], "--json: /nowhere is not a directory"),
        (["--prompt", "x", "--step", "9"], "has no checkpoint of that step; there are: 6"),
    ],
)
def test_what_cannot_be_done_is_one_message(run, capsys, options, message) -> None:
    assert main([str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_drafting_heads_decodes_plainly_and_cannot_speculate(tmp_path, tiny_data, capsys) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(model_of(read_manifest(tiny_data / "train").vocab_size, num_prediction_heads=1), folder)
    options = ["--prompt", PROMPT, "--max-tokens", "4", "--tokenizer", str(tiny_data)]
    found = generated(folder, tmp_path, *options)
    assert {"plain", "speculative"} & found.keys() == {"plain"}
    assert main([str(folder), *options, "--speculate"]) == 2
    assert "has head 0 alone, and no head that could draft" in capsys.readouterr().err
