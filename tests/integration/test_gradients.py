"""I3: R ranks and A micro-steps under ZeRO-3 give the gradient that one dense process gives for the whole batch."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.config import Settings
from pipeline.data.batch import Batch
from pipeline.model.mtp import MTPModel, initialize_weights
from tests.ranks import run_ranks

ROWS, TOKENS, HEADS, VOCAB = 8, 14, 4, 37
CASES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]


def settings_for(world_size: int, micro_steps: int, **training: Any) -> Settings:
    return Settings.model_validate(
        {
            "data": {"global_batch": ROWS, "micro_batch": ROWS // (world_size * micro_steps), "sequence_length": TOKENS},
            "model": {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": VOCAB}
            | training.pop("model", {}),
            "training": {"head_weights": [1.0, 0.5, 2.0, 0.7], "gradient_clipping": None} | training,
        }
    )


def whole_batch() -> Batch:
    """Eight rows: the first four are padding alone (so whole micro-batches are), the others hold unequal documents."""
    generator = torch.Generator().manual_seed(5)
    documents = torch.full((ROWS, TOKENS), -1, dtype=torch.int32)
    for row, lengths in {4: [14], 5: [3, 6], 6: [1, 2, 11], 7: [5, 5, 1]}.items():
        for number, (start, end) in enumerate(pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()])):
            documents[row, start:end] = number
    tokens = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    sources = torch.zeros_like(tokens)
    return Batch(tokens, documents, sources, tuple(str(row) for row in range(ROWS)))


def part_of(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.tokens_BT[rows], batch.document_ids_BT[rows], batch.sources_BT[rows], batch.keys[rows])


def dense_model(settings: Settings, **changes: Any) -> MTPModel:
    model = MTPModel(settings.model.model_copy(update=changes))
    initialize_weights(model)
    return model


def all_losses(model: MTPModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy [rows, tokens, heads] from full logits, 0 beyond the row."""
    hidden = model.unembed.norm(model.hidden_states(batch.tokens_BT, batch.document_ids_BT))
    logits = hidden @ model.unembed.weight.T
    losses = []
    for head in range(hidden.shape[2]):
        targets = F.pad(batch.tokens_BT[:, 1 + head :], (0, 1 + head))
        losses.append(
            F.cross_entropy(logits[:, :, head].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        )
    return torch.stack(losses, -1)


def dense_gradient(settings: Settings, world_size: int) -> dict[str, torch.Tensor]:
    """The objective by its formula; every pool is a range of consecutive rows, in whose order ties are taken."""
    micro_batch = settings.data.micro_batch
    rows_a_pool = {"global": world_size * micro_batch, "step": ROWS, "rank": micro_batch, "row": 1}
    num_pools = ROWS // rows_a_pool[settings.training.selection_pool]
    batch, policy = whole_batch(), dense_model(settings)
    reference = dense_model(settings, num_prediction_heads=1, seed=1)
    policy_loss = all_losses(policy, batch)
    with torch.no_grad():
        next_token = all_losses(reference, batch)[..., 0]
    pairs: dict[int, list[list[tuple[int, int]]]] = {head: [[] for _ in range(num_pools)] for head in range(HEADS)}
    for head in range(HEADS):
        for row in range(ROWS):
            for t in range(TOKENS - 1 - head):
                document = batch.document_ids_BT[row, t]
                if document >= 0 and batch.document_ids_BT[row, t + 1 + head] == document:
                    pairs[head][row // (ROWS // num_pools)].append((row, t))
    objective = torch.zeros(())
    for head, pools in pairs.items():
        selected = []
        for pool in pools:
            count = math.floor(settings.training.k_percent * len(pool) + 0.5)
            count = len(pool) if head == 0 else max(1, count)

            def excess(place: tuple[int, int], head: int = head) -> float:
                row, t = place
                return (policy_loss[row, t, head] - next_token[row, t + head]).item()

            selected += sorted(pool, key=lambda place: (-excess(place), place))[: count if pool else 0]
        total = len(selected) if settings.training.normalize_by == "selected" else sum(map(len, pools))
        for row, t in selected:
            objective = objective + settings.head_weights[head] / HEADS * policy_loss[row, t, head] / total
    objective.backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}


def sharded_gradient(settings: Settings, sharding: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same from the training's own step on this job's ranks, read just before the optimiser would use it."""
    from deepspeed.utils import safe_get_full_grad

    from pipeline.micro_step import Models
    from pipeline.runtime.checkpoint import Progress
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed
    from pipeline.train import Run, train_step

    initialize_distributed(torch.device("cpu"), "error")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch = settings.data.micro_batch
    micro_steps = ROWS // (world_size * micro_batch)
    content = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    config = resolve_deepspeed_json(content, settings, world_size)
    engine = build_policy(settings, config)
    reference_shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
    reference = build_reference(reference_shape, None, sharding, config)
    run = Run(
        settings=settings,
        world=World(rank, world_size, rank, world_size),
        device=torch.device("cpu"),
        run_dir=Path(),
        engine=engine,
        models=Models(engine, reference, "shifted", dist.group.WORLD),
        stream=SimpleNamespace(micro_steps=micro_steps, manifest=SimpleNamespace(source_names=())),  # type: ignore[arg-type]
        validation=None,
        checkpoints=None,  # type: ignore[arg-type]
    )
    starts = [(step * world_size + rank) * micro_batch for step in range(micro_steps)]
    batches = [part_of(whole_batch(), slice(start, start + micro_batch)) for start in starts]
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def read_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None
                gradients[name] = gradient.clone()
        take_step()

    engine.step = read_then_step
    result = train_step(run, iter(batches), Progress())
    return gradients, result.sums.record(result.plan.scale_H, ("",), dist.group.WORLD)


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().pow(2).sum() for name in found)
    return float((difference / sum(gradient.double().pow(2).sum() for gradient in expected.values())).sqrt())


@pytest.mark.parametrize(("world_size", "micro_steps"), CASES)
def test_the_gradient_of_ranks_and_micro_steps_is_that_of_one_dense_process(world_size: int, micro_steps: int) -> None:
    settings = settings_for(world_size, micro_steps)
    expected = dense_gradient(settings, world_size)
    answers = run_ranks(sharded_gradient, world_size, settings, "zero3")
    for gradients, record in answers:
        assert relative_error(gradients, expected) < 1e-5
        assert record["selected_ratio_head_0"] == 1.0
    assert all(record == answers[0][1] for _, record in answers)


OTHERS = {
    "selected-replicate": ({"normalize_by": "selected"}, "replicate"),
    "tied-few": ({"model": {"tied_embeddings": True}, "k_percent": 0.05}, "zero3"),
    "radix": ({"selection_exchange": "radix"}, "zero3"),
    "step": ({"selection_pool": "step", "normalize_by": "selected"}, "zero3"),
    "rank": ({"selection_pool": "rank", "normalize_by": "selected"}, "zero3"),
    "row": ({"selection_pool": "row", "normalize_by": "selected"}, "zero3"),
}


@pytest.mark.parametrize(("changes", "sharding"), OTHERS.values(), ids=OTHERS)
def test_the_gradient_is_exact_for_the_other_settings_too(changes: dict[str, Any], sharding: str) -> None:
    settings = settings_for(2, 2, **changes)
    expected = dense_gradient(settings, world_size=2)
    for gradients, _ in run_ranks(sharded_gradient, 2, settings, sharding):
        assert relative_error(gradients, expected) < 1e-5
