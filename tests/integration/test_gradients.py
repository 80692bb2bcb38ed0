"""I3: R ranks and A micro-steps under any stage of ZeRO give the gradient that one dense process gives for the whole batch."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.config import Settings
from pipeline.data.loading.batch import Batch
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.weighting.prediction import Prediction
from tests.ranks import run_ranks
from tests.rows import batch_with, part_of
from tests.stepping import Answer, WatchedEngine

ROWS, TOKENS, HEADS, VOCAB = 8, 14, 4, 37


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
    """Eight rows: the first two are padding alone (so some rank's whole micro-batch is), the others hold unequal documents,
    so that no two micro-steps have equally many pairs."""
    generator = torch.Generator().manual_seed(5)
    lengths = [[], [], [4, 7], [2, 2, 5], [14], [3, 6], [1, 2, 11], [5, 5, 1]]
    return batch_with(torch.randint(VOCAB, (ROWS, TOKENS), generator=generator), lengths)


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
    objective, policy = dense_objective(settings, world_size)
    objective.backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}


def dense_objective(settings: Settings, world_size: int) -> tuple[torch.Tensor, MTPModel]:
    """The objective by its formula; every pool is a range of consecutive rows, in whose order ties are taken."""
    micro_batch = settings.data.micro_batch
    rows_a_pool = {"global": world_size * micro_batch, "step": ROWS, "rank": micro_batch, "row": 1}
    num_pools = ROWS // rows_a_pool[settings.training.selection_pool]
    batch, policy = whole_batch(), dense_model(settings)
    reference = dense_model(settings, num_prediction_heads=1, seed=1, tied_embeddings=False)
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
    return objective, policy


class Case(NamedTuple):
    """One step: under which stage of ZeRO and how many micro-steps, with what settings of training and what expected of
    its thresholds; how the reference lies, and whether embedding and unembedding are one matrix."""

    stage: int
    micro_steps: int
    training: dict[str, Any]
    prediction: Prediction = Prediction()
    sharding: str = "zero3"
    tied: bool = False

    def settings(self, world_size: int) -> Settings:
        # With this rate a step leaves every weight as it is, to the bit: one engine serves many cases.
        training = {"learning_rate": 1e-20} | self.training
        return settings_for(world_size, self.micro_steps, model={"tied_embeddings": self.tied}, **training)


def sharded_gradients(cases: Sequence[Case]) -> list[Answer]:
    """For each case the gradient from the training's own step on this job's ranks, read just before the optimiser would
    use it, and the step's metrics."""
    from pipeline.runtime.engine import build_reference, initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    engines: dict[tuple[int, int, bool, str], Any] = {}
    references: dict[str, Any] = {}
    answers = []
    for case in cases:
        settings = case.settings(dist.get_world_size())
        config = engine_config(case.stage, settings)
        if case.sharding not in references:
            shape = settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1, "tied_embeddings": False})
            references[case.sharding] = build_reference(shape, None, case.sharding, config)
        key = (case.stage, case.micro_steps, case.tied, settings.training.activation_checkpointing)
        if key not in engines:
            engines[key] = WatchedEngine(settings, config)
        rank, world_size, rows = dist.get_rank(), dist.get_world_size(), settings.data.micro_batch
        starts = [(step * world_size + rank) * rows for step in range(case.micro_steps)]
        batches = [part_of(whole_batch(), slice(start, start + rows)) for start in starts]
        answers.append(engines[key].step(settings, references[case.sharding], batches, case.prediction))
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
    "nothing foreseen": ("predicted", Prediction()),
    "some foreseen, some wrongly": ("predicted", Prediction.of([-0.01] * 3)),
    "all foreseen": ("predicted", Prediction.of([-1e6] * 3)),
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
                if "foreseen" in name and name != "nothing foreseen":
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
        for gradients, record in answers:
            assert relative_error(gradients, expected) < 1e-5, name
            for head in range(1, HEADS):
                # What a whole step chose together is known before its first micro-step; a chunk may still want for room.
                hit_rate = record[f"prediction_hit_rate_head_{head}"]
                assert (hit_rate > 0.9) if name == "step" else hit_rate is None, name
