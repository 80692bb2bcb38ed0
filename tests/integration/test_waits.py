"""How often the host waits for its device in a step: once a micro-batch. DeepSpeed has waits of its own."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pipeline.config import Settings
from tests.ranks import run_ranks
from tests.rows import batch_of, random_lengths
from tests.waits import CountWaits

WAYS = [
    {"selection_pool": pool, "loss_phase": loss_phase, "selection_exchange": exchange}
    for pool, loss_phase, exchange in itertools.product(
        ("global", "step", "rank", "row"), ("predicted", "two_pass", "dense"), ("all_gather", "radix")
    )
]
WAYS += [{"selection_score": score} for score in ("policy_loss", "random")] + [{"k_percent": 1.0}]
ROWS, TOKENS, VOCAB = 4, 16, 32


def settings_for(micro_steps: int, heads: int, **training: Any) -> Settings:
    return Settings.model_validate(
        {
            "data": {"global_batch": micro_steps * ROWS, "micro_batch": ROWS, "sequence_length": TOKENS},
            "model": {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": VOCAB}
            | {"num_prediction_heads": heads},
            "training": training,
        }
    )


def batches(micro_steps: int) -> Iterator[Any]:
    return (batch_of(random_lengths(ROWS, TOKENS, seed), TOKENS, VOCAB, seed) for seed in range(micro_steps))


def waits_of_a_step() -> list[tuple[int, dict[str, Any], list[str], int]]:
    """For each way to take a step where the third one, with all that belongs to it in the loop, waits; and how often the whole
    device is waited for. Metrics are logged in the first step alone."""
    from pipeline.progress import Progress
    from pipeline.reporter import Reporter
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed
    from pipeline.train import advance, fetch_step, train_step
    from tests.stepping import run_of

    initialize_distributed(torch.device("cpu"), "error")
    found = []
    for micro_steps, heads in ((1, 4), (2, 4), (2, 1)):
        plain = settings_for(micro_steps, heads)
        config = resolve_deepspeed_json({"zero_optimization": {"stage": 3}}, plain, 1)
        engine = build_policy(plain, config)
        shape = plain.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
        reference = build_reference(shape, None, "replicate", config)
        for way in WAYS if heads > 1 else WAYS[:1]:
            settings = settings_for(micro_steps, heads, **way)
            run, progress = run_of(settings, engine, reference, micro_steps), Progress()
            # Not the first rank, which writes what is logged.
            reporter = Reporter(replace(run, world=World(1, 2, 1, 2)), first_step=0)
            fetched = fetch_step(run, batches(micro_steps), 0, 0)
            for _ in range(3):
                with CountWaits() as waits:
                    next_samples = progress.samples + settings.data.global_batch
                    following = fetch_step(run, batches(micro_steps), progress.step + 1, next_samples)
                    result = train_step(run, fetched, progress)
                    advance(progress, result, settings)
                    reporter.step(progress, result, following.waited)
                    assert result.applied
                    assert not following.pending.read().flags.stop_requested
                fetched = following
            found.append((micro_steps, way, waits.places, waits.device_synchronized))
    return found


def test_the_host_waits_for_the_device_at_most_once_a_micro_batch() -> None:
    (found,) = run_ranks(waits_of_a_step, 1)
    assert len(found) == 2 * len(WAYS) + 1
    for micro_steps, way, places, device_synchronized in found:
        files = [place.partition(":")[0] for place in places]
        # What is dense has nothing to repair; the rest waits to know how much it has.
        expected = [] if way.get("loss_phase") == "dense" else ["weighting/cross_entropy.py"] * micro_steps
        assert (files, device_synchronized) == (expected, 0), (micro_steps, way, places)
