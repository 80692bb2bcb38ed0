"""Runs that save, and continue, on given layouts: the training's own steps on random rows."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from pipeline.config import CheckpointSettings, ModelSettings, Settings
from pipeline.data.loading.batch import Batch
from pipeline.model.huggingface import copy_weights
from pipeline.model.mtp import MTPModel
from pipeline.progress import Progress
from pipeline.runtime.checkpoint.folders import read_state_of, step_name
from pipeline.runtime.checkpoint.state import STATE_FILE, HeldOut, State, encode
from pipeline.runtime.checkpoint.weights import CheckpointWeights
from tests.ranks import run_ranks
from tests.rows import batch_of, part_of, random_lengths
from tests.stepping import run_of

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
    device: str = "cpu"

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

    device = torch.device(layout.device)
    initialize_distributed(device, "error")
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

    # With hpZ forwards see a second copy of the weights, which a loader that forgot it would leave as it was.
    second_copies = [getattr(each, "ds_secondary_tensor", None) is not None for each in engine.module.parameters()]
    assert any(second_copies) == ("zero_hpz_partition_size" in layout.zero)

    world = World(rank, ranks, rank, ranks)
    checkpoints = Checkpoints(run_dir, world, {"deepspeed bf16": layout.bf16}, CheckpointSettings(), say=lambda text: None)
    fixed = fixed_batch()

    def losses() -> list[float]:
        return losses_of_batch(engine, fixed, settings.model.num_prediction_heads, device)

    progress = checkpoints.resume(engine, True, lambda: HeldOut(losses=losses()))
    assert progress.step == first_step
    before = losses()
    run = run_of(settings, engine, None, 1, device)
    for step in range(first_step, first_step + num_steps):
        batch = batch_of(random_lengths(ROWS, TOKENS, step), TOKENS, VOCAB, step)
        own = part_of(batch, slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks))
        fetched = fetch_step(run, iter([own]), step, step * ROWS)
        advance(progress, train_step(run, fetched, progress), settings)
    if save:
        checkpoints.save(engine, progress, HeldOut(losses=losses()), in_background=False)
    return Figures(before, losses(), progress.applied_steps)


def fixed_batch() -> Batch:
    """The batch whose losses are `Figures.before` and `Figures.after`."""
    return batch_of(random_lengths(2, TOKENS, 99), TOKENS, VOCAB, 99)


def losses_without_engine(layout: Layout, run_dir: Path, step: int) -> list[float]:
    """The fixed batch's losses by the weights of a checkpoint as they are read tensor by tensor."""
    from pipeline.evaluate import losses_of_batch

    folder = run_dir / "checkpoints" / step_name(step)
    state, problem = read_state_of(folder)
    assert state is not None, problem
    model = MTPModel(ModelSettings.model_validate(layout.model))
    copy_weights(model, CheckpointWeights(folder, state))
    return losses_of_batch(model, fixed_batch(), model.settings.num_prediction_heads, torch.device("cpu"))


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


def write_state(run_dir: Path, progress: Progress, identity: dict[str, Any]) -> None:
    """Write a checkpoint that has a state.json and nothing else: what is compared before anything is loaded."""
    folder = run_dir / "checkpoints" / step_name(progress.step)
    folder.mkdir(parents=True)
    state = State(
        format=1,
        world_size=1,
        progress=progress.to_json(),
        identity=identity,
        optimizer_step=0,
        held_out=HeldOut(),
        files=[],
        parameters={},
    )
    (folder / STATE_FILE).write_bytes(encode(state))
