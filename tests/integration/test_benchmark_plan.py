"""`launch/benchmark.py plan` at a size of no consequence: expected and measured steps side by side."""

import json
from pathlib import Path

import pytest

from tests.forked import run_script


def test_expected_and_measured_steps_stand_side_by_side(tmp_path: Path) -> None:
    done = run_script("benchmark.py", "plan", "--shapes", "2,32,2,128,32,2", "--rounds", "1", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "plan.json").read_text())
    (shape,) = figures["shapes"]
    assert shape["planned"] == pytest.approx(sum(shape["parts"].values()))
    assert shape["ratio"] == shape["planned"] / shape["measured"]
    # So small a step is all launches, which the plan leaves out.
    assert 0 < shape["planned"] < shape["measured"]
    assert "2, 32, 128, 32, 2" in done.stdout


def test_sizes_of_which_no_model_can_be_made_are_refused() -> None:
    for sizes, problem in {"2,32,2": "expected 6 whole numbers", "2,30,4,128,32,2": "--dim 30"}.items():
        done = run_script("benchmark.py", "plan", "--shapes", sizes)
        assert done.returncode == 2
        assert problem in done.stderr
