"""`launch/benchmark.py gpu` where there is no GPU: the same command at sizes of no consequence, so that it runs on the day."""

import json
import time
from pathlib import Path

import pytest
import torch

from pipeline.benchmark.gpu import PhaseClock
from tests.forked import run_script


def test_the_command_measures_steps_phases_and_memory_in_one_process(tmp_path: Path) -> None:
    done = run_script("benchmark.py", "gpu", "--shapes", "tiny", "--rounds", "1", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["matrix_flops"] > 1e8
    assert set(figures["loss_phase"]) == {"plain", "two_pass", "predicted"}
    tiny = figures["shapes"]["tiny"]
    assert 1 < tiny["flop_ratio"] < 4
    for name in ("next_token", "selective"):
        own = tiny[name]
        assert own["tokens_per_second"] == pytest.approx(64 / own["seconds"])
        assert own["planned_bytes"] > 0
        assert {"blocks", "loss", "backward", "optimizer", "other"} <= set(own["phases"])
        assert f"tiny {name}" in done.stdout
    assert tiny["selective"]["phases"]["reference"] > 0
    assert "reference" not in tiny["next_token"]["phases"]


def test_the_time_of_nested_phases_goes_to_the_innermost() -> None:
    clock = PhaseClock(torch.device("cpu"))
    clock.enter("outer")
    clock.around("inner", time.sleep)(0.05)
    clock.enter("other")
    clock.leave()
    clock.leave()
    assert clock.seconds["inner"] >= 0.05
    assert clock.seconds["outer"] < clock.seconds["inner"]
    assert clock.open == []
