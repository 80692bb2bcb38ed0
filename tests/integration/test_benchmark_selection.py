"""`launch/benchmark.py selection` as its users run it, at sizes of a moment: what it counts, what it predicts, what it says."""

import importlib.util
import json
import sys
from typing import Any

import pytest

from pipeline.benchmark.collectives import Collective
from pipeline.benchmark.selection import modelled_seconds, predicted, wire_bytes
from tests.forked import ROOT, run_script

TOKENS, RANKS = (60, 300), (2, 4, 8)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """The figures of one run, and the lines it printed."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    command = ["selection", "--runs", "2", "--json", file, "--tokens", *TOKENS, "--ranks", *RANKS]
    done = run_script("benchmark.py", *command, timeout=1500, with_its_processes=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8")), done.stdout.splitlines()


def test_the_model_predicts_the_bytes_that_were_counted_exactly(benchmark) -> None:
    rows = benchmark[0]["measured"]
    assert [(row["ranks"], row["tokens"], row["way"]) for row in rows] == [
        (ranks, tokens, way) for ranks in RANKS for tokens in TOKENS for way in ("local", "all_gather", "radix", "quantile")
    ]
    for row in rows:
        expected = predicted(row["way"], row["ranks"], row["tokens"], heads=3)
        assert [Collective(*collective) for collective in row["collectives"]] == expected
        assert row["predicted_wire_bytes"] == row["wire_bytes"] == wire_bytes(expected, row["ranks"])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes is read on Linux alone")
def test_the_kernel_counts_those_bytes_and_little_else_on_the_sockets(benchmark) -> None:
    for row in benchmark[0]["measured"]:
        # gloo says a few words of its own to each peer.
        own = 600 * (row["ranks"] - 1) * len(row["collectives"])
        assert row["wire_bytes"] <= row["sockets_bytes"] <= row["wire_bytes"] + own, row


def test_what_was_measured_are_times(benchmark) -> None:
    for row in benchmark[0]["measured"]:
        assert len(row["all_seconds"]) == 2
        assert min(row["all_seconds"]) <= row["seconds"] <= max(row["all_seconds"])
        assert row["seconds"] > 0
        assert row["times_all_gather"] > 0
        assert row["way"] != "all_gather" or row["times_all_gather"] == 1


def test_the_table_says_what_the_figures_say(benchmark) -> None:
    figures, lines = benchmark
    radix = next(row for row in figures["measured"] if (row["ranks"], row["way"]) == (8, "radix"))
    (line,) = [line for line in lines if line.startswith("8 × 60 ") and "radix" in line]
    assert f"{radix['wire_bytes']:,.0f}" in line
    assert "exact" in line
    assert "torch.quantile of 2**24 + 1 values: quantile() input tensor is too large" in "\n".join(lines)
    at_1024 = next(row for row in figures["model"] if row["gpus"] == 1024)
    (line,) = [line for line in lines if line.startswith("1,024 ")]
    for way in ("all_gather", "radix"):
        assert f"{at_1024[way]['wire_bytes'] / 1e6:,.3f} MB" in line
    assert [row["quantile_refuses"] for row in figures["model"]] == [False, False, False, True]


def test_at_a_thousand_gpus_gathering_moves_hundreds_of_megabytes_and_histograms_a_tenth_of_one() -> None:
    assert wire_bytes(predicted("all_gather", 1024, 16384, 3), 1024) == 1023 * 4 * 3 * 16384
    histograms, ties = predicted("radix", 1024, 16384, 3)[:3], predicted("radix", 1024, 16384, 3)[3:]
    assert wire_bytes(histograms, 1024) == pytest.approx(2 * 4 * 3 * (2048 + 2048 + 1024), rel=1e-3)
    assert wire_bytes(ties, 1024) == 2 * 1023 * 4 * 3
    assert predicted("radix", 1024, 16384, 3) == predicted("radix", 1024, 2**20, 3)
    # From 2**31 pairs on the counts no longer fit into 4 bytes.
    assert wire_bytes(predicted("radix", 4096, 2**19, 3), 4096) == 2 * wire_bytes(predicted("radix", 4096, 2**18, 3), 4096)


def test_bytes_on_the_wire_are_those_of_a_ring() -> None:
    def ring(kind: str, payload: int, ranks: int) -> float:
        """Sent by one rank: a gather passes R-1 blocks on; a sum passes a part R-1 times, and its total R-1 times."""
        block = payload if kind == "all_gather" else payload / ranks
        return block * (ranks - 1) * (1 if kind == "all_gather" else 2)

    for kind in ("all_gather", "all_reduce"):
        for ranks in (1, 2, 3, 8, 4096):
            assert Collective(kind, 1200).wire_bytes(ranks) == pytest.approx(ring(kind, 1200, ranks))


def test_the_models_time_is_messages_and_bytes() -> None:
    # 8 ranks: 3 messages of a gather, 6 of a sum.
    assert modelled_seconds([Collective("all_gather", 1000)], 8, 5.0, 50.0) == pytest.approx(3 * 5e-6 + 7 * 1000 / 50e9)
    summed = [Collective("all_reduce", 8000)]
    assert modelled_seconds(summed, 8, 5.0, 50.0) == pytest.approx(6 * 5e-6 + 2 * 7 * 1000 / 50e9)
    assert modelled_seconds(2 * summed, 8, 5.0, 50.0) == pytest.approx(2 * modelled_seconds(summed, 8, 5.0, 50.0))
    assert modelled_seconds(summed, 1, 5.0, 50.0) == 0


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--ranks", "two"], ["--token", "4"], []])
def test_a_command_line_that_is_wrong_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("launch_benchmark", ROOT / "launch" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["selection", *wrong] if wrong else []) == 2
    assert (wrong or ["selection|"])[0] in capsys.readouterr().err
