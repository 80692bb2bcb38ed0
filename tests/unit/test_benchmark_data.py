"""launch/benchmark.py data: what it measures and prints."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest

from pipeline.benchmark.streaming import _waiting, random_rows

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_stream_is_measured_beside_a_bare_loop_on_the_same_rows(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("launch_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures_file = tmp_path / "figures.json"
    sizes = ["--rows", "64", "--sequence-length", "32", "--lanes", "8", "--repeat", "1"]
    assert module.main(["data", "--only", "streaming", *sizes, "--json", str(figures_file)]) == 0
    figures = json.loads(figures_file.read_text())["streaming"]
    speeds = figures["tokens_per_second"]
    assert set(speeds) >= {"webdataset, bare", "stream, 1 worker", "stream, no worker"}
    assert all(speed > 0 for speed in speeds.values())
    assert figures["stream_over_webdataset"] == speeds["stream, 1 worker"] / speeds["webdataset, bare"]
    printed = capsys.readouterr().out
    assert f"{figures['stream_over_webdataset']:.2f}   (goal: 2)" in printed
    assert figures["stream_tokens_per_cpu_second"] > 0
    assert f"{figures['stream_tokens_per_cpu_second'] / 1e6:.1f}M tokens/s   (goal: 20)" in printed
    assert 0 < figures["waiting_share"] < 1
    assert f"{figures['waiting_share']:.2%}   (goal: below 1%" in printed


def test_waiting_is_the_share_of_the_time_that_is_not_the_pace(tmp_path):
    # So fast a pace that next to nothing but waiting is left, and so slow a one that next to nothing waits.
    directory = random_rows(tmp_path, 512, 64)
    shares = [_waiting(directory, Namespace(lanes=8, micro_batch=8, pace=pace)) for pace in (1e12, 40_000)]
    assert shares[0] > 0.5 > shares[1]
