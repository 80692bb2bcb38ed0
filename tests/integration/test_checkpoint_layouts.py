"""A checkpoint continues on any layout: number of ranks, ZeRO stage, offloading, hpZ, precision."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from pipeline.config import CheckpointSettings, Settings
from tests.ranks import run_ranks
from tests.rows import batch_of, part_of, random_lengths
from tests.stepping import CPU, run_of

ROWS, TOKENS, VOCAB = 4, 32, 64
# Some parameters (norms of 4 values) are smaller than the number of ranks needs them to be.
SHAPE = {"dim": 12, "num_layers": 3, "num_attention_heads": 2, "vocab_size": VOCAB}


class Layout(NamedTuple):
    ranks: int
    stage: int = 3
    bf16: bool = False
    zero: dict[str, Any] = {}  # noqa: RUF012 (a default that nobody changes)
    model: dict[str, Any] = SHAPE
    frozen: tuple[str, ...] = ()

    @property
    def deepspeed(self) -> dict[str, Any]:
        """As the shipped files have it: gradients are summed in float32, which makes stage 1 in bf16 another optimizer."""
        float32 = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        return {"zero_optimization": {"stage": self.stage, **self.zero}, "bf16": {"enabled": self.bf16}, **float32}


class Figures(NamedTuple):
    """before: the fixed batch's loss of each head, as a forward sees the weights; after: the same once trained on."""

    before: list[float]
    after: list[float]
    applied: int


def train_on(layout: Layout, run_dir: Path, first_step: int, num_steps: int, save: bool) -> Figures:
    """Continue from what the run directory has, or begin; on every rank."""
    from pipeline.evaluate import losses_of_batch
    from pipeline.runtime.checkpoint.checkpoints import Checkpoints
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import build_policy, initialize_distributed
    from pipeline.train import advance, fetch_step, train_step

    initialize_distributed(CPU, "error")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    values: dict[str, Any] = {
        "data": {"global_batch": ROWS, "micro_batch": ROWS // ranks, "sequence_length": TOKENS},
        "model": layout.model,
        "training": {"learning_rate": 1e-2, "warmup_steps": 0, "selection_score": "policy_loss"},
    }
    settings = Settings.model_validate(values)
    with pytest.MonkeyPatch.context() as patch:
        freeze_while_building(patch, layout.frozen)
        engine = build_policy(settings, resolve_deepspeed_json(layout.deepspeed, settings, ranks))

    world = World(rank, ranks, rank, ranks)
    checkpoints = Checkpoints(run_dir, world, {}, CheckpointSettings(), say=lambda text: None)
    fixed = batch_of(random_lengths(2, TOKENS, 99), TOKENS, VOCAB, 99)

    def losses() -> list[float]:
        return losses_of_batch(engine, fixed, settings.model.num_prediction_heads, CPU)

    progress = checkpoints.resume(engine, False, losses, tolerance=0.05 if layout.bf16 else 1e-4)
    assert progress.step == first_step
    before = losses()
    run = run_of(settings, engine, None, 1)
    for step in range(first_step, first_step + num_steps):
        batch = batch_of(random_lengths(ROWS, TOKENS, step), TOKENS, VOCAB, step)
        own = part_of(batch, slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks))
        fetched = fetch_step(run, iter([own]), step, step * ROWS)
        advance(progress, train_step(run, fetched, progress), settings)
    if save:
        checkpoints.save(engine, progress, losses(), in_background=False)
    return Figures(before, losses(), progress.applied_steps)


def freeze_while_building(patch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    from pipeline.runtime import engine

    def build(*arguments: Any) -> Any:
        model = original(*arguments)
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        return model

    original = engine._build_model
    patch.setattr(engine, "_build_model", build)


def trained(layout: Layout, run_dir: Path, first_step: int, num_steps: int, save: bool = False) -> Figures:
    of_ranks = run_ranks(train_on, layout.ranks, layout, run_dir, first_step, num_steps, save)
    assert all(figures == of_ranks[0] for figures in of_ranks)
    return of_ranks[0]


HPZ = {"zero_hpz_partition_size": 2}
OTHER_KEYS = {"sub_group_size": 1000, "reduce_bucket_size": 777, "stage3_param_persistence_threshold": 0}
LAYOUTS = {
    "1 rank": Layout(1),
    "3 ranks": Layout(4),
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
    continued = trained(layout, tmp_path, 2, 2)
    assert continued.before == first.after
    elsewhere = trained(layout._replace(ranks=1, stage=4 - stage), tmp_path, 2, 2)
    assert elsewhere.before == pytest.approx(first.after, rel=1e-6)
    assert elsewhere.after == pytest.approx(continued.after, rel=1e-5)
