"""Command lines of data: what is wrong with an argument or a folder is one clear message, and the exit code says which."""

import importlib.util
from pathlib import Path

import pytest

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
    assert (output.out, output.err) == ("", f"error: expected {option} of at least {least}, got {value}\n")


def test_no_steps_are_no_lines(tmp_path, capsys):
    assert run("shards", "order", numbered_data(tmp_path / "data", 24), "--global-batch", 4, "--steps", 0) == 0
    assert capsys.readouterr() == ("", "")


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
