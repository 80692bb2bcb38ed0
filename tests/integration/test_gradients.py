"""I3: R ranks and A micro-steps under any stage of ZeRO give the gradient that one dense process gives for the whole batch."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.weighting.prediction import Prediction
from tests.dense import HEADS, dense_model, dense_objective_by_head, external_scores, settings_for, whole_batch
from tests.ranks import run_ranks
from tests.rows import part_of
from tests.stepping import Answer, WatchedEngine


def dense_gradient(settings: Settings, world_size: int) -> dict[str, torch.Tensor]:
    (first, *others), policy = dense_objective_by_head(settings, world_size)
    sum(others, first).backward(retain_graph=settings.training.detach_heads)
    if settings.training.detach_heads:
        # What lies below the heads learns of the first alone.
        below = [*policy.trunk.parameters(), *policy.embed.parameters()]
        for parameter, gradient in zip(below, torch.autograd.grad(first, below), strict=True):
            parameter.grad = gradient
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}


def trunk_gradient_norms(settings: Settings, world_size: int) -> list[float]:
    """Of each head, by autograd: the norm of the gradient of its part of the objective at the trunk's output."""
    policy, inputs = dense_model(settings), {}
    for head, block in enumerate(policy.heads):
        block.register_forward_pre_hook(lambda _, arguments, head=head: inputs.update({head: arguments[0]}))
    losses, _ = dense_objective_by_head(settings, world_size, policy)
    gradients = [torch.autograd.grad(loss, inputs[head], retain_graph=True)[0] for head, loss in enumerate(losses)]
    is_cut = settings.training.detach_heads
    return [0.0 if is_cut and head else gradient.norm().item() for head, gradient in enumerate(gradients)]


class Case(NamedTuple):
    """One step: under which stage of ZeRO and how many micro-steps, with what settings of training and what expected of
    its thresholds; how the reference lies, whether embedding and unembedding are one matrix, and the step's number."""

    stage: int
    micro_steps: int
    training: dict[str, Any]
    prediction: Prediction = Prediction()
    sharding: str = "zero3"
    tied: bool = False
    number: int = 0

    def settings(self, world_size: int) -> Settings:
        # With this rate a step leaves every weight as it is, to the bit: one engine serves many cases.
        training = {"learning_rate": 1e-20} | self.training
        return settings_for(world_size, self.micro_steps, model={"tied_embeddings": self.tied}, **training)


def sharded_gradients(cases: Sequence[Case]) -> list[Answer]:
    """For each case the gradient from the training's own step on this job's ranks, read just before the optimiser would
    use it, and the step's metrics."""
    from pipeline.runtime.engine import build_reference, initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    engines: dict[tuple[Any, ...], Any] = {}
    references: dict[str, Any] = {}
    answers = []
    for case in cases:
        settings = case.settings(dist.get_world_size())
        config = engine_config(case.stage, settings)
        if case.sharding not in references:
            shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1, "tied_embeddings": False})
            references[case.sharding] = build_reference(shape, None, case.sharding, config)
        key = (
            case.stage,
            case.micro_steps,
            case.tied,
            settings.training.activation_checkpointing,
            settings.training.detach_heads,
        )
        if key not in engines:
            engines[key] = WatchedEngine(settings, config)
        rank, world_size, rows = dist.get_rank(), dist.get_world_size(), settings.data.micro_batch
        starts = [(step * world_size + rank) * rows for step in range(case.micro_steps)]
        batches = [part_of(whole_batch(), slice(start, start + rows)) for start in starts]
        if settings.training.selection_score == "external":
            scores = external_scores()[..., None]
            batches = [
                replace(batch, reference_losses_BTC=scores[start : start + rows])
                for batch, start in zip(batches, starts, strict=True)
            ]
        reference = references[case.sharding] if settings.reference.horizon == "shifted" else None
        answers.append(engines[key].step(settings, reference, batches, case.prediction, number=case.number))
    return answers


def engine_config(stage: int, settings: Settings) -> dict[str, Any]:
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json

    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return resolve_deepspeed_json({"zero_optimization": zero}, settings, dist.get_world_size())


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().pow(2).sum() for name in found)
    return float((difference / sum(gradient.double().pow(2).sum() for gradient in expected.values())).sqrt())


FORMS = {
    "two_pass": ("two_pass", Prediction()),
    "dense": ("dense", Prediction()),
    "nothing predicted": ("predicted", Prediction()),
    "some predicted, some wrongly": ("predicted", Prediction.of([-0.01] * 3)),
    "all predicted": ("predicted", Prediction.of([-1e6] * 3)),
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_gradient_of_ranks_and_micro_steps_is_that_of_one_dense_process(world_size: int) -> None:
    """For every stage of ZeRO, accumulation and form of the loss phase. The first ranks have nothing but padding."""
    cases, names = [], []
    for stage, micro_steps in itertools.product((3, 2, 1, 0), (1, 2)):
        for name, (loss_phase, prediction) in FORMS.items():
            names.append((name, stage, micro_steps))
            cases.append(Case(stage, micro_steps, {"loss_phase": loss_phase}, prediction))
    expected = {steps: dense_gradient(settings_for(world_size, steps), world_size) for steps in (1, 2)}
    by_rank = run_ranks(sharded_gradients, world_size, cases)
    for (name, stage, micro_steps), *answers in zip(names, *by_rank, strict=True):
        for gradients, record in answers:
            assert relative_error(gradients, expected[micro_steps]) < 1e-5, (name, stage, micro_steps)
            assert record["selected_ratio_head_0"] == 1.0
            assert record == answers[0][1]
            for head in range(1, HEADS):
                hit_rate = record[f"prediction_hit_rate_head_{head}"]
                if "predicted" in name and name != "nothing predicted":
                    assert 0.5 < hit_rate < 1.0, name
                else:
                    assert hit_rate is None


OTHERS = {
    "selected-replicate": Case(3, 2, {"normalize_by": "selected"}, sharding="replicate"),
    "tied-few": Case(3, 2, {"k_percent": 0.05}, tied=True),
    "radix": Case(3, 2, {"selection_exchange": "radix"}),
    "step": Case(3, 2, {"selection_pool": "step", "normalize_by": "selected"}),
    "step-two_pass": Case(3, 2, {"selection_pool": "step", "loss_phase": "two_pass"}),
    "rank": Case(3, 2, {"selection_pool": "rank", "normalize_by": "selected"}),
    "row": Case(3, 2, {"selection_pool": "row", "normalize_by": "selected"}),
    "recompute-all": Case(3, 2, {"activation_checkpointing": "full"}),
    "recompute-between": Case(3, 2, {"activation_checkpointing": "selective"}),
}


def test_the_gradient_is_exact_for_the_other_settings_too() -> None:
    by_rank = run_ranks(sharded_gradients, 2, list(OTHERS.values()))
    for name, case, *answers in zip(OTHERS, OTHERS.values(), *by_rank, strict=True):
        expected = dense_gradient(case.settings(2), world_size=2)
        norms = trunk_gradient_norms(case.settings(2), world_size=2)
        for gradients, record in answers:
            assert relative_error(gradients, expected) < 1e-5, name
            assert [record[f"trunk_grad_norm_head_{head}"] for head in range(HEADS)] == pytest.approx(norms, rel=1e-4), name
            for head in range(1, HEADS):
                # What a whole step chose together is known before its first micro-step; a chunk may still want for room.
                hit_rate = record[f"prediction_hit_rate_head_{head}"]
                assert (hit_rate > 0.9) if name == "step" else hit_rate is None, name


FORESEEN = Prediction.of([0.0] * 3)
OPTIONS = {
    "own": Case(3, 2, {"horizon": "own"}, FORESEEN),
    "own-step": Case(3, 2, {"horizon": "own", "selection_pool": "step"}, FORESEEN),
    "own-row-dense": Case(3, 2, {"horizon": "own", "selection_pool": "row", "loss_phase": "dense"}),
    "external": Case(3, 2, {"selection_score": "external", "normalize_by": "selected"}, FORESEEN),
    "external-step": Case(3, 2, {"selection_score": "external", "selection_pool": "step"}, FORESEEN),
    "detached": Case(3, 2, {"detach_heads": True}, FORESEEN),
    "detached-recompute": Case(3, 2, {"detach_heads": True, "activation_checkpointing": "full"}),
    "detached-stage-1": Case(1, 2, {"detach_heads": True}, FORESEEN),
}


def test_the_gradient_of_each_option_is_that_of_one_dense_process() -> None:
    by_rank = run_ranks(sharded_gradients, 2, list(OPTIONS.values()))
    for name, case, *answers in zip(OPTIONS, OPTIONS.values(), *by_rank, strict=True):
        expected = dense_gradient(case.settings(2), world_size=2)
        norms = trunk_gradient_norms(case.settings(2), world_size=2)
        for gradients, record in answers:
            assert relative_error(gradients, expected) < 1e-5, name
            assert [record[f"trunk_grad_norm_head_{head}"] for head in range(HEADS)] == pytest.approx(norms, rel=1e-4), name
            assert record == answers[0][1]
            assert record["selected_ratio_head_1"] < 0.7
            # Predictions that are right in part, or come of a scoring pass.
            hit_rate = record["prediction_hit_rate_head_1"]
            assert (hit_rate is not None) == (case.prediction is FORESEEN), name


# A step of settings that change over time, and constant ones that it must equal.
WEIGHTS = [[0, [1.0, 0.0, 0.0, 4.0]], [10, [2.0, 1.0, 0.0, 0.0]]]
COURSES = {
    "stepwise, before": (Case(3, 2, {"head_weights": WEIGHTS}, number=9), {"head_weights": [1.0, 0.0, 0.0, 4.0]}),
    "stepwise, from its step on": (Case(3, 2, {"head_weights": WEIGHTS}, number=10), {"head_weights": [2.0, 1.0, 0.0, 0.0]}),
    "linear": (
        Case(3, 2, {"head_weights": WEIGHTS, "head_weights_change": "linear"}, number=4),
        {"head_weights": [1.4, 0.4, 0.0, 2.4]},
    ),
    "k_percent": (
        Case(3, 2, {"k_percent": [[0, 1.0], [8, 0.2]], "k_percent_change": "linear", "normalize_by": "selected"}, number=5),
        {"k_percent": 0.5, "normalize_by": "selected"},
    ),
    "in the warm-up": (Case(3, 2, {"selection_warmup_steps": 6}, number=5), {"k_percent": 1.0}),
    "after the warm-up": (Case(3, 2, {"selection_warmup_steps": 6, "k_percent": 0.3}, number=6), {"k_percent": 0.3}),
}


def test_a_step_of_settings_that_change_over_time_is_one_of_constant_ones() -> None:
    by_rank = run_ranks(sharded_gradients, 2, [case for case, _ in COURSES.values()])
    for (name, (_, constant)), *answers in zip(COURSES.items(), *by_rank, strict=True):
        expected = dense_gradient(settings_for(2, 2, **constant), world_size=2)
        for gradients, _ in answers:
            assert relative_error(gradients, expected) < 1e-5, name
