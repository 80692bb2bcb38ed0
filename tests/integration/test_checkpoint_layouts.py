"""A checkpoint continues on any layout: number of ranks, ZeRO stage, offloading, hpZ, precision."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config import CheckpointSettings, Settings
from pipeline.progress import Progress
from pipeline.runtime.checkpoint.state import HeldOut
from tests.checkpointing import SHAPE, Figures, Layout, losses_without_engine, trained
from tests.forked import ROOT
from tests.planned import in_use, resident_anonymous
from tests.ranks import run_ranks

# The shipped file's, on two nodes of two ranks.
HPZ = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text())["zero_optimization"] | {"zero_hpz_partition_size": 2}
OTHER_KEYS = {"sub_group_size": 1000, "reduce_bucket_size": 777, "stage3_param_persistence_threshold": 0}
LAYOUTS = {
    "1 rank": Layout(1),
    "4 ranks": Layout(4),
    "stage 1": Layout(2, 1),
    "stage 2": Layout(2, 2),
    "round robin": Layout(2, 2, zero={"round_robin_gradients": True}),
    "other keys": Layout(2, zero=OTHER_KEYS),
    "hpz": Layout(4, zero=HPZ),
    "offloaded": Layout(2, zero={"offload_optimizer": {"device": "cpu"}}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Figures, Figures]:
    """A run of two ranks under ZeRO-3 after 3 steps, what it had then, and what it had after 3 more."""
    run_dir = tmp_path_factory.mktemp("saved")
    first = trained(Layout(2), run_dir, 0, 3, save=True)
    return run_dir, first, trained(Layout(2), run_dir, 3, 3)


def test_the_same_layout_continues_to_the_bit(saved: tuple[Path, Figures, Figures], tmp_path: Path) -> None:
    _, first, continued = saved
    assert continued.before == first.after
    assert continued.after == trained(Layout(2), tmp_path, 0, 6).after


def test_second_copies_of_weights_within_a_node_continue_to_the_bit(tmp_path: Path) -> None:
    first = trained(LAYOUTS["hpz"], tmp_path / "cut", 0, 2, save=True)
    continued = trained(LAYOUTS["hpz"], tmp_path / "cut", 2, 2)
    assert continued.before == first.after
    assert continued.after == trained(LAYOUTS["hpz"], tmp_path / "whole", 0, 4).after


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_continues(saved: tuple[Path, Figures, Figures], name: str) -> None:
    run_dir, _, continued = saved
    found = trained(LAYOUTS[name], run_dir, 3, 3)
    assert found.before == pytest.approx(continued.before, rel=1e-6)
    assert found.after == pytest.approx(continued.after, rel=1e-5)
    assert found.applied == 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_of_another_layout_is_continued(saved: tuple[Path, Figures, Figures], tmp_path: Path, name: str) -> None:
    _, first, continued = saved
    written = trained(LAYOUTS[name], tmp_path, 0, 3, save=True)
    assert written.after == pytest.approx(first.after, rel=1e-5)
    assert losses_without_engine(LAYOUTS[name], tmp_path, 3) == pytest.approx(written.after, rel=1e-6)
    found = trained(Layout(2), tmp_path, 3, 3)
    assert found.before == pytest.approx(written.after, rel=1e-6)
    assert found.after == pytest.approx(continued.after, rel=1e-5)


TIED = SHAPE | {"tied_embeddings": True}
FROZEN = ("unembed.weight", "heads.1.ffn.down.weight", "trunk.0.ffn_norm.weight")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_continues_to_the_bit_and_on_another_stage(tmp_path: Path, stage: int) -> None:
    first = trained(Layout(2, stage, bf16=True), tmp_path, 0, 2, save=True)
    continued = trained(Layout(2, stage, bf16=True), tmp_path, 2, 2)
    assert continued.before == first.after
    assert continued.after == trained(Layout(2, stage, bf16=True), tmp_path / "whole", 0, 4).after

    elsewhere = trained(Layout(1, 1 + stage % 3, bf16=True), tmp_path, 2, 2)
    assert elsewhere.before == first.after
    assert elsewhere.after == pytest.approx(continued.after, rel=0.02)
    # The master weights are float32 in both.
    assert trained(Layout(2, stage), tmp_path, 2, 0).before == pytest.approx(first.after, rel=0.02)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("changes", [{"model": TIED}, {"frozen": FROZEN}], ids=["tied", "frozen"])
def test_tied_and_frozen_parameters_continue(tmp_path: Path, stage: int, changes: dict[str, Any]) -> None:
    layout = Layout(2, stage, **changes)
    first = trained(layout, tmp_path, 0, 2, save=True)
    assert losses_without_engine(layout, tmp_path, 2) == pytest.approx(first.after, rel=1e-6)
    continued = trained(layout, tmp_path, 2, 2)
    assert continued.before == first.after
    elsewhere = trained(layout._replace(ranks=1, stage=4 - stage), tmp_path, 2, 2)
    assert elsewhere.before == pytest.approx(first.after, rel=1e-6)
    assert elsewhere.after == pytest.approx(continued.after, rel=1e-5)


LARGE = {"dim": 384, "num_layers": 6, "num_attention_heads": 6, "vocab_size": 8192}


def memory_while_loading(run_dir: Path, save: bool) -> float:
    """Peak while loading ÷ held afterwards, in anonymous memory, what was there before the engine left out."""
    from pipeline.runtime.checkpoint.checkpoints import Checkpoints
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import build_policy, initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = Settings.model_validate(
        {"data": {"global_batch": ranks, "micro_batch": 1, "sequence_length": 64}, "model": LARGE}
    )
    before = in_use(torch.device("cpu"))
    engine = build_policy(settings, resolve_deepspeed_json(Layout(ranks).deepspeed, settings, ranks))
    checkpoints = Checkpoints(run_dir, World(rank, ranks, rank, ranks), {}, CheckpointSettings(), say=lambda text: None)
    if save:
        checkpoints.save(engine, Progress(step=1), HeldOut(), in_background=False)
        return 0.0

    # What building left behind, freed but kept by the allocator, is not loading's.
    seen, loaded = [in_use(torch.device("cpu"))], threading.Event()

    def watch() -> None:
        while not loaded.wait(0.002):
            seen.append(resident_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert checkpoints.resume(engine, allow_changed=False).step == 1
    loaded.set()
    watcher.join()
    return (max(seen) - before) / (in_use(torch.device("cpu")) - before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loading_takes_hardly_more_memory_than_what_is_loaded(tmp_path: Path, ranks: int) -> None:
    run_ranks(memory_while_loading, 1, tmp_path, True)
    assert max(run_ranks(memory_while_loading, ranks, tmp_path, False)) < 1.2
