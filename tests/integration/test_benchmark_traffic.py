"""The traffic of a micro-step under ZeRO-3: what a cluster's network carries, counted on this machine."""

import argparse
import json
from typing import Any

import pytest

from pipeline.benchmark.collectives import Collective
from pipeline.benchmark.traffic import Called, figures_of, table
from tests.forked import run_script

LAYERS, DIM, FFN, VOCAB = 9, 64, 192, 512
BLOCK = 4 * DIM**2 + 3 * DIM * FFN
BLOCKS = LAYERS + 3 + LAYERS


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures, and what was printed."""
    file = tmp_path_factory.mktemp("traffic") / "traffic.json"
    sizes = ["--layers", LAYERS, "--dim", DIM, "--vocabulary", VOCAB, "--ranks", 2]
    done = run_script("benchmark.py", "traffic", *sizes, "--json", file, with_its_processes=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_a_block_of_policy_and_reference_comes_in_one_all_gather_each_way(traffic: tuple[dict[str, Any], str]) -> None:
    """With room for five blocks, 7B's ratio to DeepSpeed's default limits."""
    figures, printed = traffic
    assert figures["blocks"] == BLOCKS
    assert figures["live_blocks"] == 5
    assert figures["all_gathers"] <= 3.2 * BLOCKS + 2
    # Two norms of each policy block and the last one.
    assert figures["once_a_step"] == 2 * (LAYERS + 3) + 1
    assert f"{figures['once_a_step']} of them of small vectors" in printed
    assert figures["reduce_scatters"] >= 1
    assert 1 <= figures["largest_gather_blocks"] <= max(1.2, VOCAB * DIM / BLOCK)
    assert f"{figures['all_gathers']} all-gathers for {BLOCKS} blocks" in printed


def test_gathered_weights_stay_within_the_live_limit_and_the_block_at_work(traffic: tuple[dict[str, Any], str]) -> None:
    figures, _ = traffic
    # What is fetched ahead may end with one matrix more than the bucket takes.
    assert 1 < figures["most_gathered_blocks"] <= 5 + 1 + DIM * FFN / BLOCK + 0.01


def test_the_bytes_are_those_of_the_weights_and_their_gradient(traffic: tuple[dict[str, Any], str]) -> None:
    figures, _ = traffic
    assert figures["bytes"] == sum(kind["bytes"] for kind in figures["by_kind"].values())
    embeddings = 2 * VOCAB * DIM
    policy, reference = (LAYERS + 3) * BLOCK + embeddings, LAYERS * BLOCK + embeddings
    # On two ranks each sends its half. In backward the policy's blocks come again, but for those that were still there.
    gathered = figures["by_kind"]["all_gather"]["bytes"]
    assert 4 * (policy + reference) / 2 < gathered < 4 * (2 * policy + reference) / 2 * 1.01
    assert figures["by_kind"]["reduce_scatter"]["bytes"] == pytest.approx(4 * policy / 2, rel=0.01)


def test_a_node_that_does_not_divide_the_ranks_is_refused() -> None:
    done = run_script("benchmark.py", "traffic", "--ranks", 4, "--gpus-per-node", 3)
    assert done.returncode == 2
    assert "--gpus-per-node: got 3; expected a divisor of --ranks = 4" in done.stderr


def test_what_is_gathered_within_a_node_is_counted_by_itself() -> None:
    """Count those of 4 ranks in nodes of 2, where a block has 100 values. tests/integration/test_hpz.py records such a step."""
    sizes = {"ranks": 4, "gpus_per_node": 2, "layers": 9, "vocabulary": 5, "dim": 10, "live_blocks": 5}
    called = [Called(Collective("all_gather", 100), 4), Called(Collective("all_gather", 240), 2)]
    called += [Called(Collective("reduce_scatter", 800), 4)]
    figures = figures_of(argparse.Namespace(**sizes), [{"block": 100, "called": called, "most_gathered": 150}])
    assert figures["by_kind"]["all_gather"] == {"calls": 2, "bytes": 3 * 100 + 240}
    assert figures["in_a_node"] == {"all_gather": {"calls": 1, "bytes": 240}}
    assert figures["bytes"] == 3 * 100 + 240 + 3 * 200
    assert figures["largest_gather_blocks"] == 2 * 240 / 400
    # The first one's 400 bytes are 10 D values, which may be a vector's; the other one gathers 480.
    assert figures["once_a_step"] == 1
    assert [line.split()[-2:] for line in table(figures).splitlines() if "in a node" in line] == [["1", "0.000"]]
