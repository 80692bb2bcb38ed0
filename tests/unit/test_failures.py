"""Failures that a user or a machine causes: one message with the file and the remedy, and exit code 2, from every command."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.failures import guarded
from tests.data_sets import numbered_data
from tests.forked import ROOT, run_script

DEEP = "[" * 100_000
ZERO3 = ROOT / "ds_configs" / "zero3.json"


def failing(error: BaseException) -> int:
    raise error


def panic() -> int:
    """A regular expression whose search never ends in its library's patience: a panic, which is no Exception."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    tokenizer.encode("a" * 3000 + "c")
    return 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device; free some of the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; have its permissions changed"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "Address already in use; choose another port"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files; raise the limit on open files"),
        (OSError(errno.ESTALE, "Stale file handle", "a"), "a: Stale file handle; mend that and start again"),
        (
            OSError(errno.EISDIR, "Is a directory", "a.tmp", None, "a"),
            "a: Is a directory; expected a file, and this is a folder",
        ),
        (OSError(errno.ENOSPC, "No space left", "from", None, "to"), "to: No space left; free some of the disk"),
        (OSError("a message of our own"), "a message of our own"),
        (MemoryError("8 TiB"), "this machine's memory is used up (8 TiB)"),
        (DataError("expected a folder"), "expected a folder"),
        (ConfigError(["first", "second"], "a remedy"), "2 problems with the settings:\n  - first\n  - second\na remedy\n"),
    ],
)
def test_a_failure_of_the_machine_or_the_user_is_one_message(capsys, error, message) -> None:
    assert guarded("train.py: error", lambda: failing(error), (DataError, ConfigError)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"train.py: error: {message}")


def test_a_librarys_panic_is_one_message(capsys) -> None:
    assert guarded("error", panic, ()) == 2
    assert "error: a library failed: Onig: Regex search error" in capsys.readouterr().err


def more_memory_than_there_is() -> int:
    return torch.empty(2**60).numel()


def test_memory_that_torch_cannot_have_is_one_message(capsys) -> None:
    for body in (more_memory_than_there_is, lambda: failing(torch.OutOfMemoryError("CUDA out of memory.\nMore of it"))):
        assert guarded("error", body, ()) == 2
        error = capsys.readouterr().err
        assert re.search(r"^error: this machine's memory is used up \(.*\); use smaller sizes or fewer processes\n$", error), (
            error
        )


def test_an_error_that_all_ranks_raise_is_printed_by_the_first_and_one_of_a_machine_by_each(capsys) -> None:
    assert guarded("error", lambda: failing(DataError("no")), (DataError,), is_first=False) == 2
    assert capsys.readouterr().err == ""
    assert guarded("error", lambda: failing(OSError(errno.ENOSPC, "full", "a")), (), is_first=False) == 2
    assert capsys.readouterr().err.startswith("error: a: full")


def test_a_mistake_of_the_programs_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        guarded("error", lambda: failing(KeyError("key")), (DataError,))
    with pytest.raises(RuntimeError):
        guarded("error", lambda: failing(RuntimeError("bug")), (DataError,))


def one_message(script: str, *arguments: object, limit: str = "") -> str:
    """The standard error of a command that must end with code 2 and one message. limit: options of the shell's ulimit."""
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *map(str, arguments)]
    if limit:
        command = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr.partition("error: ")[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "number {number} of many"}}\n' for number in range(500)))
    return tmp_path / "in.jsonl"


def test_preparing_on_a_full_disk_or_where_a_file_is_in_the_way_is_one_message(text: Path, tmp_path: Path) -> None:
    arguments = ["--input", text, "--tokenizer", "bytes", "--sequence-length", 32, "--processes", 1]
    full = one_message("prepare", *arguments, "--output", tmp_path / "data", limit="-f 8")
    assert str(tmp_path / "data") in full
    assert "File too large; raise the limit on the size of files" in full
    in_the_way = one_message("prepare", *arguments, "--output", text / "data")
    assert in_the_way.startswith(f"{text}")
    assert "a part of this path is a file" in in_the_way
    too_long = one_message("prepare", *arguments, "--output", tmp_path / ("x" * 300))
    assert "choose a shorter name" in too_long


def test_shards_with_unreadable_files_are_one_message(tmp_path: Path) -> None:
    folder = numbered_data(tmp_path / "data", 24)
    for content in (DEEP, "\0", '{"shards": 3}'):
        (folder / "manifest.json").write_text(content)
        assert f"{folder / 'manifest.json'} is not a valid manifest" in one_message("shards", "verify", folder)
    assert "choose a shorter name" in one_message("shards", "inspect", tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(DEEP, "nested too deeply"), ("{} {}", "Extra data"), ("\xff", "'utf-8' codec"), (None, "expected a JSON file")],
)
def test_a_deepspeed_json_that_is_none_is_one_message(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path
    if content is not None:
        path = tmp_path / "deepspeed.json"
        path.write_bytes(content.encode("latin-1"))
    message = one_message("plan", "--deepspeed", path, "--gpus", 2)
    assert f"--deepspeed: {path}" in message or f"this is a folder: {path}" in message
    assert problem in message


def test_a_plan_that_cannot_be_written_is_one_message() -> None:
    message = one_message("plan", "--deepspeed", ZERO3, "--gpus", 2, "--json", "/dev/full")
    assert message.startswith("/dev/full: No space left on device; free some of the disk")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["heads", "--tokens", "0"], "--tokens: expected a whole number of at least 1, got '0'"),
        (["data", "--pace", "-1"], "--pace: expected a number above 0, got '-1'"),
        (["step", "--json", "/no/such/folder/figures.json"], "--json: /no/such/folder is not a directory; make it first"),
        (["data", "--only", "streaming", "--data", "/no/such/folder"], "expected a folder of prepared shards"),
    ],
)
def test_a_benchmark_that_cannot_be_measured_is_refused_before_it_begins(arguments, said) -> None:
    finished = run_script("benchmark.py", *arguments, environment=dict(os.environ))
    assert finished.returncode == 2
    assert f"error: {said}" in finished.stderr
    assert "Traceback" not in finished.stderr
