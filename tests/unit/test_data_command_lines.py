"""Command lines of data: what is wrong with an argument or a folder is one clear message, and the exit code says which."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from pipeline.data.shards.manifest import read_manifest
from pipeline.data.tokenizer import byte_tokenizer
from tests.data_sets import numbered_data

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments):
    spec = importlib.util.spec_from_file_location(f"launch_{script}", ROOT / "launch" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*map(str, arguments)])


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--ranks", 0, 1),
        ("--global-batch", 0, 1),
        ("--micro-batch", 0, 1),
        ("--lanes", 0, 1),
        ("--shuffle-block", 0, 1),
        ("--steps", -2, 0),
        ("--workers", -1, 0),
        ("--start", -4, 0),
    ],
)
def test_an_order_that_cannot_be_is_refused_by_the_name_of_its_option(tmp_path, capsys, option, value, least):
    folder = numbered_data(tmp_path / "data", 24)
    arguments = {"--global-batch": 4, "--steps": 1, "--ranks": 1} | {option: value}
    pairs = [each for pair in arguments.items() for each in pair]
    assert run("shards", "order", folder, *pairs) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"error: {option}: expected a whole number of at least {least}, got '{value}'\n")


def test_no_steps_are_no_lines(tmp_path, capsys):
    assert run("shards", "order", numbered_data(tmp_path / "data", 24), "--global-batch", 4, "--steps", 0) == 0
    assert capsys.readouterr() == ("", "")


def test_an_order_over_many_ranks_reads_the_manifest_once(tmp_path, capsys, monkeypatch):
    folder = numbered_data(tmp_path / "data", 64)
    read = []

    def read_bytes(path, of=Path.read_bytes):
        read.append(path.name)
        return of(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    arguments = ["--global-batch", 16, "--steps", 2]
    assert run("shards", "order", folder, *arguments, "--ranks", 16) == 0
    assert read == ["manifest.json"]
    of_many = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(rank) for _, rank, _, _ in of_many] == [*range(16)] * 2
    assert run("shards", "order", folder, *arguments) == 0
    of_one = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(step, *where) for step, _, *where in of_many] == [(step, *where) for step, _, *where in of_one]


def test_an_order_leaves_out_the_rows_that_a_rollback_did(tmp_path, capsys):
    arguments = ["order", numbered_data(tmp_path / "data", 64), "--global-batch", 4, "--steps"]
    assert run("shards", *arguments, 8) == 0
    every = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert run("shards", *arguments, 4, "--skip", 4, 8, "--skip", 16, 24) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(step) for step in range(4) for _ in range(4)]
    assert [line[1:] for line in lines] == every[:4] + every[8:16] + every[24:28]
    for wrong in (["--skip", 4, 6], ["--skip", 8, 4], ["--skip", 8, 12, "--skip", 4, 8]):
        assert run("shards", *arguments, 1, *wrong) == 2
        assert capsys.readouterr().err.startswith("error: expected stretches of rows, first and end, in multiples of 4")


def test_an_order_of_a_pipe_is_refused_without_an_option_that_it_has_not(capsys):
    assert run("shards", "order", "pipe:cat data/{}", "--global-batch", 4, "--steps", 1) == 2
    assert capsys.readouterr().err == (
        "error: order runs no command of a pipe, as in pipe:cat ***; name a folder or another URL\n"
    )


def test_an_interruption_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    folder = numbered_data(tmp_path / "data", 24)
    monkeypatch.setattr(hashlib, "sha256", interrupted)
    assert run("shards", "verify", folder) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_what_the_machine_cannot_read_is_told_with_what_is_known(tmp_path, capsys):
    folder = numbered_data(tmp_path / "data", 24)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/proc/self/mem")  # a file whose first bytes are an input/output error
    assert run("shards", "inspect", folder) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder} cannot be read: Input/output error; the machine is at fault")
    (folder / "manifest.json").unlink()
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (folder / "shard-00000.tar").unlink()
    (folder / "shard-00000.tar").symlink_to("/proc/self/mem")
    assert run("shards", "index", folder) == 2
    assert capsys.readouterr().err == "error: Input/output error; mend that and start again\n"


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_without_a_name_is_refused_in_one_line(tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    arguments = ["--input", "a.txt", "--tokenizer", "bytes", "--sequence-length", "8"]
    assert run("prepare", *arguments, "--output", output) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: expected an output folder with a name of its own")
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_verify_names_every_shard_that_is_cut_and_exits_with_one(tmp_path, capsys):
    folder = numbered_data(tmp_path / "data", 24, samples_per_shard=8)
    for name in ("shard-00000.tar", "shard-00002.tar"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert run("shards", "verify", folder) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert [name in output.err for name in ("shard-00000.tar has", "shard-00001", "shard-00002.tar has")] == [True, False, True]


def test_a_tilde_is_the_home_folder_behind_any_option_and_a_folder_of_prepared_folders_is_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = "".join(f'{{"text": "number {number} of many"}}\n' for number in range(60))
    (tmp_path / "in.jsonl").write_text(lines)
    arguments = ["--input", "a=~/in.jsonl", "--sequence-length", 16, "--processes", 1]
    assert run("prepare", *arguments, "--output=~/first", "--tokenizer", "bytes", "--validation", 0.3) == 0
    assert run("prepare", *arguments, "--output=~/second", "--tokenizer=~/first") == 0
    assert read_manifest(tmp_path / "second").tokenizer_sha256 == read_manifest(tmp_path / "first" / "train").tokenizer_sha256
    for directory in ("~/first", "~/second"):
        assert run("shards", "verify", directory) == 0


def test_a_tokenizer_taken_from_a_folder_within_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    arguments = ["--input", tmp_path / "a.txt", "--sequence-length", 4, "--processes", 1]
    assert run("prepare", *arguments, "--output", tmp_path / "data" / "first", "--tokenizer", "bytes") == 0
    assert run("prepare", *arguments, "--output", tmp_path / "a", "--tokenizer", tmp_path / "data" / "first") == 0
    assert "the tokenizer is" not in capsys.readouterr().out
    assert run("prepare", *arguments, "--output", tmp_path / "b", "--tokenizer", tmp_path / "data") == 0
    assert f"the tokenizer is {tmp_path / 'data' / 'first' / 'tokenizer.json'}\n" in capsys.readouterr().out


def test_too_little_text_for_a_bpe_or_for_one_row_is_warned_of_with_both_numbers(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text " * 20)
    arguments = ["--input", tmp_path / "a.txt", "--processes", 1]
    for _ in range(2):  # made, and there already
        assert run("prepare", *arguments, "--output", tmp_path / "out", "--train-bpe", 400, "--sequence-length", 128) == 0
        output = capsys.readouterr()
        assert "warning: the BPE has 261 ids and not the 400 asked for: the input has no more pairs to merge" in output.err
        assert f"warning: {tmp_path / 'out'}: its 22 tokens do not fill one row of 128; give more input" in output.err
    assert run("prepare", *arguments, "--output", tmp_path / "fits", "--tokenizer", "bytes", "--sequence-length", 101) == 0
    assert "warning" not in capsys.readouterr().err


def test_prepared_folders_of_two_tokenizers_are_no_tokenizer(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    arguments = ["--input", tmp_path / "a.txt", "--sequence-length", 8, "--processes", 1]
    assert run("prepare", *arguments, "--output", tmp_path / "data" / "a", "--tokenizer", "bytes") == 0
    assert run("prepare", *arguments, "--output", tmp_path / "data" / "b", "--train-bpe", 257) == 0
    assert run("prepare", *arguments, "--output", tmp_path / "out", "--tokenizer", tmp_path / "data") == 2
    named = f"name one of {tmp_path / 'data' / 'a' / 'tokenizer.json'}, {tmp_path / 'data' / 'b' / 'tokenizer.json'}"
    message = f"the folders of {tmp_path / 'data'} have different tokenizers, or documents that begin or end with different"
    assert capsys.readouterr().err.endswith(f"error: {message} tokens; {named}\n")


def test_all_that_is_wrong_with_the_options_of_preparing_is_said_at_once(tmp_path, capsys):
    paths = ["--input", f"a={tmp_path / 'none'}", "--input", f"b={tmp_path / 'nothing'}"]
    sizes = ["--sequence-length", 1, "--processes", 0, "--samples-per-shard", "x", "--weight", "c=1", "--weight", "a=0"]
    assert run("prepare", *paths, *sizes, "--packin", "concat", "stray", "--train-bpe", 300, "--tokenizer", "bytes") == 2
    head, *problems = capsys.readouterr().err.rstrip("\n").split("\n  - ")
    assert head == f"error: {len(problems)} problems with the options:"
    beginnings = [
        "--sequence-length: expected a whole number of at least 2, got '1'",
        "--processes: expected a whole number of at least 1, got '0'",
        "--samples-per-shard: expected a whole number of at least 1, got 'x'",
        "the following arguments are required: --output",
        "--packin: unknown option; did you mean '--packing'?",
        "'stray': not expected here",
        "--weight c=1: there is no input named 'c'",
        "--weight a=0: expected a number above 0",
        "expected either --tokenizer, the one to use, or --train-bpe",
        f"no files at '{tmp_path / 'none'}'",
        f"no files at '{tmp_path / 'nothing'}'",
    ]
    assert len(problems) == len(beginnings)
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.startswith(beginning)


def test_all_that_is_wrong_with_the_options_of_an_order_is_said_at_once(capsys):
    assert run("shards", "order", "--ranks", 0, "--steps", "x", "--step") == 2
    assert capsys.readouterr().err.split("\n  - ")[1:] == [
        "--ranks: expected a whole number of at least 1, got '0'",
        "--steps: expected a whole number of at least 0, got 'x'",
        "the following arguments are required: DIR, --global-batch; shards.py --help says more",
        "--step: unknown option; did you mean '--steps'?\n",
    ]


def test_no_option_of_another_command_is_suggested(capsys):
    assert run("shards", "index", "data", "--row", 3) == 2
    assert capsys.readouterr().err == (
        "error: --row: unknown option; known are: --end-of-document, --help, --source, --tokenizer, -h\n"
    )


@pytest.mark.parametrize("option", ["--sequence-length", "--samples-per-shard", "--max-document-bytes", "--train-bpe"])
def test_a_number_too_large_to_compute_with_is_refused_by_its_option(tmp_path, capsys, option):
    (tmp_path / "a.txt").write_text("text")
    given = {"--input": tmp_path / "a.txt", "--output": tmp_path / "out", "--tokenizer": "bytes", "--sequence-length": 8}
    given |= {option: 10**30}
    assert run("prepare", *(each for pair in given.items() for each in pair)) == 2
    assert f"{option}: expected a whole number of at most " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
