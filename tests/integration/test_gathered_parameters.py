"""ZeRO-3 on two ranks gives gathered weights back, however many heads branch off the trunk (DeepSpeed issue 8481).

There, modules with several branches under activation checkpointing kept what was gathered during backward. What the coordinator
holds is looked at whenever it has fetched something, the only thing that can make it more.
"""

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.rows import batch_with
from tests.stepping import run_of

DIM, FEED_FORWARD = 32, 128
# Of a block, which is gathered as one; its norms are never given back.
BLOCK = 4 * DIM**2 + 3 * DIM * FEED_FORWARD
HEADS = (2, 6)


def steps(settings: Any, zero: dict[str, Any]) -> dict[str, list[int]]:
    """For each of two steps the most values of parameters that were gathered, and how many are after each backward."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from pipeline.progress import Progress
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy
    from pipeline.train import advance, fetch_step, train_step

    engine = build_policy(settings, resolve_deepspeed_json({"zero_optimization": {"stage": 3, **zero}}, settings, 2))
    parameters = list(engine.module.parameters())
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    fetch, backward, during = coordinator.fetch_sub_module, engine.backward, []
    seen: dict[str, list[int]] = {"most": [], "left": []}

    def gathered() -> int:
        return sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist)

    def fetch_and_look(*arguments: Any, **more: Any) -> None:
        fetch(*arguments, **more)
        during.append(gathered())

    def backward_and_look(*arguments: Any, **more: Any) -> None:
        backward(*arguments, **more)
        seen["left"].append(gathered())

    coordinator.fetch_sub_module, engine.backward = fetch_and_look, backward_and_look
    run = run_of(settings, engine, None, micro_steps=2)
    batch = batch_with(torch.arange(32).view(2, 16), [[16], [16]])
    progress = Progress()
    for _ in range(2):
        during.clear()
        result = train_step(run, fetch_step(run, iter([batch] * 2), progress.step, progress.samples), progress)
        advance(progress, result, settings)
        assert result.applied
        seen["most"].append(max(during))
    return seen


# By what the settings allow beyond the modules at work: nothing, or a block, whether fetched ahead or kept for its next use.
WINDOWS = {
    0: {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    BLOCK: {
        "stage3_prefetch_bucket_size": BLOCK,  # as `auto` is
        "stage3_max_live_parameters": BLOCK,
        "stage3_max_reuse_distance": BLOCK,
    },
}


KINDS = ("none", "selective", "full")


def with_few_and_with_many_heads() -> dict[tuple[str, int], list[dict[str, list[int]]]]:
    from pipeline.config import Settings
    from pipeline.runtime.engine import initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    shape = {"dim": DIM, "num_layers": 3, "num_attention_heads": 2, "ffn_dim": FEED_FORWARD, "vocab_size": 64}
    persistence = {"stage3_param_persistence_threshold": DIM}

    def settings(kind: str, heads: int) -> Settings:
        data = {"global_batch": 8, "micro_batch": 2, "sequence_length": 16}
        model = shape | {"num_prediction_heads": heads}
        return Settings.model_validate({"data": data, "model": model, "training": {"activation_checkpointing": kind}})

    return {
        (kind, allowed): [steps(settings(kind, heads), zero | persistence) for heads in HEADS]
        for kind in KINDS
        for allowed, zero in WINDOWS.items()
    }


@pytest.fixture(scope="module")
def seen_on_ranks() -> list[dict[tuple[str, int], list[dict[str, list[int]]]]]:
    return run_ranks(with_few_and_with_many_heads, 2)


@pytest.mark.slow
@pytest.mark.parametrize("allowed", WINDOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_gathered_weights_are_bounded_by_the_settings_and_given_back_whatever_the_number_of_heads(
    kind: str, allowed: int, seen_on_ranks: list[dict[tuple[str, int], list[dict[str, list[int]]]]]
) -> None:
    # A block that is made again is entered while the module whose backward asked for it is at work.
    at_work = BLOCK * (1 if kind == "none" else 2)
    for seen in seen_on_ranks:
        few, many = seen[kind, allowed]
        assert max(few["most"]) == max(many["most"]) >= BLOCK
        assert max(many["most"]) <= allowed + at_work
        assert few["left"] == many["left"] == [0] * 4
