"""The copy of the code and of the files it was given that a job on Slurm keeps, for its next lives."""

from pathlib import Path

import pytest

from pipeline.recipe_layers import read_recipe_file
from pipeline.runtime.code_version import git_commit
from pipeline.slurm.code_copy import keep_code, with_kept_files


def test_a_copy_of_the_code_stays_what_it_was(tmp_path: Path) -> None:
    checkout, copy = tmp_path / "checkout", tmp_path / "run" / "slurm" / "7" / "code"
    for name in ("launch/train.py", "pipeline/train.py", "ds_configs/zero3.json"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("before")
    copy.parent.mkdir(parents=True)
    keep_code(checkout, copy)
    (checkout / "launch" / "train.py").write_text("after")
    keep_code(checkout, copy)
    assert (copy / "launch" / "train.py").read_text() == "before"


def test_a_job_keeps_the_files_that_it_was_given_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, copy = tmp_path / "checkout", tmp_path / "run" / "code"
    files = [checkout / "mine.yaml", tmp_path / "outside.yaml", checkout / "zero3.json", tmp_path / "own.json"]
    checkout.mkdir()
    for file in files:
        file.write_text("before")
    monkeypatch.chdir(checkout)
    given = ["--deepspeed", "zero3.json", f"--config={checkout}/mine.yaml", "--config", "../outside.yaml"]
    given += [f"--deepspeed={tmp_path}/own.json", "a.b=c", "--config", "typo"]
    kept = with_kept_files(given, copy)
    assert kept[-3:] == given[-3:]

    # Edited and removed afterwards; the command line stays what it was, and so does what it names.
    for file in files:
        file.write_text("after") if file.suffix == ".json" else file.unlink()
    assert with_kept_files(given, copy) == with_kept_files(kept, copy) == kept
    named = [Path(argument.partition("=")[2] or argument) for argument in kept if str(copy) in argument]
    assert [file.read_text() for file in named] == ["before"] * 4


@pytest.mark.parametrize(
    "line",
    [
        "base: {} # the lab's",
        "base: '{}'",
        'base:   "{}"',
        '"base": {} # two\n',
        "base:\n  {}",
        "run: {{name: x#y}}\nbase: {}\r\nmodel: {{seed: 3}}",
    ],
)
@pytest.mark.parametrize("base", ["common.yaml", "../common.yaml", "{outside}/the lab/common#1.yaml", "~/common.yaml"])
def test_a_recipe_is_kept_with_its_bases_as_it_was_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, base: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe, copy = tmp_path / "checkout" / "launch" / "recipes" / "mine.yaml", tmp_path / "run" / "code"
    named = base.format(outside=tmp_path)
    below = recipe.parent / Path(named).expanduser()
    for file, text in (
        (recipe, line.format(named)),
        (below, "base: deeper/lowest.yaml\ntraining: {steps: 7}"),
        (below.parent / "deeper" / "lowest.yaml", "base: null\ntraining: {learning_rate: 0.5}"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    expected = read_recipe_file(recipe)
    assert expected[0]["training"] == {"steps": 7, "learning_rate": 0.5}

    (_, kept) = with_kept_files(["--config", str(recipe)], copy)
    for file in [below, below.parent / "deeper" / "lowest.yaml", recipe]:
        file.unlink()
    assert with_kept_files(["--config", str(recipe)], copy) == ["--config", kept]
    assert read_recipe_file(Path(kept)) == expected


def test_a_copy_knows_the_commit_of_its_origin(tmp_path: Path) -> None:
    (tmp_path / "COMMIT").write_text("0123abc-dirty\n")
    assert git_commit(tmp_path) == "0123abc-dirty"
    (tmp_path / "COMMIT").write_text("")
    assert git_commit(tmp_path) is None
