"""A trunk that is frozen for the first steps stays as it is to the last byte, and then trains as if it had seen zeros."""

import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.model.mtp import MTPModel
from pipeline.progress import Progress
from pipeline.runtime.checkpoint.folders import read_state_of
from pipeline.runtime.checkpoint.weights import CheckpointWeights
from tests.dense import dense_model, dense_objective, settings_for, whole_batch
from tests.integration.test_pipeline_rho1 import resume
from tests.integration.test_pipeline_rho1 import settings_for as settings_of_a_run
from tests.ranks import run_ranks
from tests.rows import part_of
from tests.stepping import run_of

FROZEN, STEPS, RATE, DECAY = 2, 4, 1e-2, 0.1
Weights = dict[str, torch.Tensor]


class Case(NamedTuple):
    stage: int
    tied: bool
    loss_phase: str = "predicted"

    def settings(self) -> Settings:
        return settings_for(
            world_size=2,
            micro_steps=2,
            model={"tied_embeddings": self.tied, "num_layers": 3},
            loss_phase=self.loss_phase,
            freeze_trunk_steps=FROZEN,
            learning_rate=RATE,
            warmup_steps=0,
            final_learning_rate_fraction=1.0,
            weight_decay=DECAY,
            # Large, so that a gradient of nearly zero does not become a step of full length by rounding.
            adam_eps=1e-2,
            k_percent=1.0,
        )


CASES = [Case(3, False), Case(3, True, "dense"), Case(2, False), Case(1, True)]


class Seen(NamedTuple):
    """What is there after a step: weights by name, this rank's part of the trunk's moments, and the gradient's norm."""

    weights: Weights
    moments: list[torch.Tensor]
    norm: float


def train_steps(cases: list[Case]) -> list[list[Seen]]:
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed
    from tests.integration.test_gradients import engine_config

    initialize_distributed(torch.device("cpu"), "error")
    shape = cases[0].settings().model.model_copy(update={"num_prediction_heads": 1, "seed": 1, "tied_embeddings": False})
    reference = build_reference(shape, None, "zero3", engine_config(3, cases[0].settings()))
    answers = []
    for case in cases:
        settings = case.settings()
        config = engine_config(case.stage, settings)
        answers.append(list(steps_of(settings, build_policy(settings, config), reference)))
    return answers


def steps_of(settings: Settings, engine: Any, reference: Any) -> Iterator[Seen]:
    """What is there at the beginning, and after each step on the same rows."""
    from pipeline.train import advance, fetch_step, train_step

    rank, size, rows = dist.get_rank(), dist.get_world_size(), settings.data.micro_batch
    batches = [part_of(whole_batch(), slice(start, start + rows)) for start in (rank * rows, (size + rank) * rows)]
    run, progress = run_of(settings, engine, reference, len(batches)), Progress()
    yield Seen(weights_of(engine), [], 0.0)
    for step in range(STEPS):
        result = train_step(run, fetch_step(run, iter(batches), step, 0), progress)
        assert result.applied
        advance(progress, result, settings)
        assert result.gradient_norm is not None
        yield Seen(weights_of(engine), moments_of(engine), float(result.gradient_norm))


def weights_of(engine: Any) -> Weights:
    from pipeline.runtime.engine import gathered

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with gathered(parameter):
            weights[name] = parameter.detach().clone()
    return weights


def moments_of(engine: Any) -> list[torch.Tensor]:
    """This rank's part of the trunk's moments."""
    from pipeline.runtime.checkpoint.fragments import fragments_of

    trunk = [fragment for fragment in fragments_of(engine) if is_of_trunk(fragment.name)]
    return [fragment.tensors[kind].clone() for fragment in trunk for kind in ("exp_avg", "exp_avg_sq")]


def is_of_trunk(name: str) -> bool:
    return name.startswith(("embed.", "trunk."))


def dense_steps(case: Case) -> list[tuple[Weights, float]]:
    """The same in one process: AdamW over everything, with the frozen weights put back and their gradients zero."""
    settings = case.settings()
    policy: MTPModel = dense_model(settings)
    matrices = [each for each in policy.parameters() if each.dim() == 2]
    vectors = [each for each in policy.parameters() if each.dim() < 2]
    training = settings.training
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=RATE,
        betas=(training.beta1, training.beta2),
        eps=training.adam_eps,
        weight_decay=DECAY,
    )
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        dense_objective(settings, 2, policy)[0].backward()
        kept = {name: each.detach().clone() for name, each in policy.named_parameters() if is_of_trunk(name)}
        if step < FROZEN:
            for name in kept:
                policy.get_parameter(name).grad.zero_()
        norm = torch.cat([each.grad.flatten() for each in policy.parameters()]).norm()
        optimizer.step()
        if step < FROZEN:
            with torch.no_grad():
                for name, values in kept.items():
                    policy.get_parameter(name).copy_(values)
        seen.append(({name: each.detach().clone() for name, each in policy.named_parameters()}, float(norm)))
    return seen


@pytest.fixture(scope="module")
def trained() -> list[list[list[Seen]]]:
    return run_ranks(train_steps, 2, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_a_frozen_trunk_stays_to_the_byte_and_then_trains(trained, number: int) -> None:
    beginning, *steps = trained[0][number]
    for step, seen in enumerate(steps):
        for name, before in beginning.weights.items():
            kept = torch.equal(seen.weights[name].view(torch.int32), before.view(torch.int32))
            assert kept == (step < FROZEN and is_of_trunk(name)), (step, name)
        assert all(bool(moment.any()) == (step >= FROZEN) for moment in seen.moments)


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_every_step_with_a_frozen_trunk_and_after_it_is_that_of_one_dense_process(trained, number: int) -> None:
    for seen, (weights, norm) in zip(trained[0][number][1:], dense_steps(CASES[number]), strict=True):
        assert seen.norm == pytest.approx(norm, rel=1e-4)
        for name, expected in weights.items():
            torch.testing.assert_close(seen.weights[name], expected, rtol=1e-4, atol=2e-6)


def test_a_run_that_is_killed_while_its_trunk_is_frozen_goes_on_bit_for_bit(tiny_data, tiny_reference, tmp_path) -> None:
    more = ("training.freeze_trunk_steps=3", "training.steps=5", "checkpoint.every=1", "checkpoint.keep=9")
    settings = settings_of_a_run(tiny_data, tiny_reference, *more)
    assert run_ranks(resume, 2, settings, tmp_path / "whole") == [0, 0]

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in range(3, 6):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step-{step:08d}")
    assert run_ranks(resume, 2, settings, tmp_path / "killed") == [0, 0]

    def last(run: str) -> list[bytes]:
        folder = tmp_path / run / "checkpoints" / "step-00000005"
        return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]

    assert last("killed") == last("whole")
    # As nothing but the frozen steps tells them apart, the trunk of the third checkpoint is that of the first.
    first, third = (
        CheckpointWeights(folder, read_state_of(folder)[0])
        for folder in (tmp_path / "whole" / "checkpoints" / f"step-{step:08d}" for step in (1, 3))
    )
    assert torch.equal(first.tensor("trunk.0.ffn.up.weight"), third.tensor("trunk.0.ffn.up.weight"))
    assert not torch.equal(first.tensor("heads.1.ffn.up.weight"), third.tensor("heads.1.ffn.up.weight"))

    # Nor does another number of ranks move it.
    shutil.copytree(tmp_path / "whole", tmp_path / "alone")
    for step in range(2, 6):
        shutil.rmtree(tmp_path / "alone" / "checkpoints" / f"step-{step:08d}")
    assert run_ranks(resume, 1, settings, tmp_path / "alone") == [0]
    third, fifth = (
        CheckpointWeights(folder, read_state_of(folder)[0])
        for folder in (tmp_path / "alone" / "checkpoints" / f"step-{step:08d}" for step in (3, 5))
    )
    for name in filter(is_of_trunk, first.state.parameters):
        assert torch.equal(third.tensor(name), first.tensor(name))
        assert not torch.equal(fifth.tensor(name), first.tensor(name))
