"""ds_configs/zero3_hpz.json on four ranks as two nodes of two: what is gathered over all ranks and within a node, and that the
gradient is that of one process."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.benchmark.collectives import CollectiveRecorder
from pipeline.weighting.prediction import Prediction
from tests.dense import dense_model, dense_objective, settings_for, whole_batch
from tests.ranks import run_ranks
from tests.rows import part_of
from tests.stepping import WatchedEngine

RANKS, NODE, MICRO_STEPS = 4, 2, 2
FLOAT32 = 4
CONTENT = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3_hpz.json").read_text())
BLOCK = 4 * 16**2 + 3 * 16 * 32
# A block stays from forward to backward.
CONTENT["zero_optimization"] |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), BLOCK)


class Found(NamedTuple):
    """The findings of a rank.

    gradient: of the first step. called: the collectives of the third as (kind, bytes held after a gather, ranks of the group).
    planned: the traffic that is expected of it.
    """

    gradient: dict[str, torch.Tensor]
    called: list[tuple[str, int, int]]
    planned: Any


def two_steps() -> Found:
    """Two engines with hpZ in one process, as where the policy has a sharded reference."""
    from pipeline.planning.planned_job import PlannedJob
    from pipeline.planning.traffic import step_traffic
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json, with_nodes_of
    from pipeline.runtime.engine import build_reference, initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    # With this rate a step leaves every weight as it is, to the bit.
    settings = settings_for(RANKS, MICRO_STEPS, learning_rate=1e-20)
    config = resolve_deepspeed_json(with_nodes_of(CONTENT, NODE, RANKS), settings, RANKS)
    shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
    reference, policy = build_reference(shape, None, "zero3", config), WatchedEngine(settings, config)
    rank = int(os.environ["RANK"])
    batches = [part_of(whole_batch(), slice(row, row + 1)) for row in (rank, RANKS + rank)]
    gradient, _ = policy.step(settings, reference, batches, Prediction())

    # The third step is that of a run: DeepSpeed learns the order of modules in two.
    policy.engine.step = policy.take_step
    policy.step(settings, reference, batches, Prediction())
    with CollectiveRecorder() as recorder:
        policy.step(settings, reference, batches, Prediction())
    calls = zip(recorder.collectives, recorder.ranks, strict=True)
    called = [(each.kind, each.payload * ranks, ranks) for each, ranks in calls]
    return Found(gradient, called, step_traffic(PlannedJob(settings, config, RANKS, False, shape, "zero3")))


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return run_ranks(two_steps, RANKS)


def matrices(model: torch.nn.Module) -> int:
    """Bytes of a model's matrices; its vectors stay gathered."""
    return FLOAT32 * sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def test_only_a_steps_first_forward_gathers_over_the_nodes(found: list[Found]) -> None:
    settings = settings_for(RANKS, MICRO_STEPS)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1)
    embeddings = matrices(policy.embed) + matrices(policy.unembed)
    # The selection's exchange gathers excesses, and ZeRO-3 its vectors after the step.
    vectors = sum(parameter.ndim == 1 for parameter in policy.parameters())
    exchange = [("all_gather", RANKS * FLOAT32 * 3 * 14, RANKS)] * MICRO_STEPS
    within = MICRO_STEPS * matrices(reference) + (MICRO_STEPS - 1) * matrices(policy)
    within += MICRO_STEPS * (matrices(policy) - embeddings - FLOAT32 * BLOCK)
    for rank in found:
        gathers = [call for call in rank.called if call[0] == "all_gather"]
        for each in exchange:
            gathers.remove(each)
        of_nodes = [size for _, size, ranks in gathers if ranks == NODE]
        of_all = sorted(size for _, size, ranks in gathers if ranks == RANKS)[vectors:]
        assert len(of_nodes) + len(of_all) + vectors == len(gathers)
        assert sum(of_all) == matrices(policy)
        assert sum(of_nodes) == within
        # Gradients are reduced over all.
        assert {ranks for kind, _, ranks in rank.called if kind == "reduce_scatter"} == {RANKS}


def test_the_plan_counts_the_gathers_that_were_recorded(found: list[Found]) -> None:
    for rank in found:
        planned = rank.planned
        times = [(planned.reference, MICRO_STEPS), (planned.forward, 1), (planned.later_forward, 1), (planned.backward, 2)]
        for ranks, others in ((NODE, 0), (RANKS, MICRO_STEPS)):
            expected = sum(number * each.calls for each, number in times if each.ranks == ranks)
            expected += others + (planned.updated.calls if ranks == RANKS else 0)
            assert sum(call[0] == "all_gather" and call[2] == ranks for call in rank.called) == expected


def test_the_gradient_is_that_of_one_process(found: list[Found]) -> None:
    objective, policy = dense_objective(settings_for(RANKS, MICRO_STEPS), RANKS)
    objective.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    for rank in found:
        gradient = torch.cat([rank.gradient[name].flatten() for name, _ in policy.named_parameters()])
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
