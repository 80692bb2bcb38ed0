"""The preparing figures: of the same text, by their units, on the command line and in the JSON."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_prints_the_figures_that_it_writes(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 2000)
    command = [
        sys.executable,
        str(ROOT / "launch" / "benchmark.py"),
        "data",
        "--only",
        "preparing",
        "--text",
        str(tmp_path / "text.txt"),
    ]
    done = subprocess.run(
        [*command, "--processes", "1", "--json", str(tmp_path / "figures.json")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["preparing"]
    speeds = figures["tokens_per_second"]
    assert figures["characters"] == 48_000
    assert figures["prepare_over_encode_batch"] == pytest.approx(speeds["prepare"] / speeds["encode_batch"])
    ratio, cpu_ratio = figures["prepare_over_encode_batch"], figures["cpu_prepare_over_encode_batch"]
    assert f"prepare / encode_batch         {ratio:8.2f}   (goal: 0.9) {cpu_ratio:12.2f}" in done.stdout
    assert figures["cpu_prepare_over_encode_batch_fast"] == pytest.approx(
        figures["tokens_per_cpu_second"]["prepare"] / figures["tokens_per_cpu_second"]["encode_batch_fast"]
    )
    for name, turns in figures["turns"].items():
        assert speeds[name] == statistics.median(by_clock for by_clock, _ in turns)
        assert figures["tokens_per_cpu_second"][name] == statistics.median(by_cpu for _, by_cpu in turns)
