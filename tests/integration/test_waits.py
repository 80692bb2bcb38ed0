"""How often the host waits for its device in a step: once a micro-batch. DeepSpeed has waits of its own."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.config import Settings
from tests.ranks import run_ranks
from tests.rows import batch_of, random_lengths
from tests.waits import CountWaits

POOLS, LOSS_PHASES, EXCHANGES = ("global", "step", "rank", "row"), ("predicted", "two_pass", "dense"), ("all_gather", "radix")
ROWS, TOKENS, VOCAB = 4, 16, 32


def settings_for(micro_steps: int, **training: Any) -> Settings:
    return Settings.model_validate(
        {
            "data": {"global_batch": micro_steps * ROWS, "micro_batch": ROWS, "sequence_length": TOKENS},
            "model": {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": VOCAB},
            "training": training,
        }
    )


def batches(micro_steps: int) -> Iterator[Any]:
    return (batch_of(random_lengths(ROWS, TOKENS, seed), TOKENS, VOCAB, seed) for seed in range(micro_steps))


def waits_of_a_step() -> list[tuple[tuple[Any, ...], list[str]]]:
    """For each way to take a step where the second one, with all that belongs to it but metrics, waits."""
    from pipeline.runtime.checkpoint import Progress
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.distributed import any_rank
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed
    from pipeline.train import advance, train_step
    from tests.stepping import run_of

    initialize_distributed(torch.device("cpu"), "error")
    found: list[tuple[tuple[Any, ...], list[str]]] = []
    for micro_steps in (1, 2):
        plain = settings_for(micro_steps)
        config = resolve_deepspeed_json({"zero_optimization": {"stage": 3}}, plain, 1)
        engine = build_policy(plain, config)
        shape = plain.model.model_copy(update={"num_prediction_heads": 1, "seed": 1})
        reference = build_reference(shape, None, "replicate", config)
        for pool, loss_phase, exchange in itertools.product(POOLS, LOSS_PHASES, EXCHANGES):
            settings = settings_for(micro_steps, selection_pool=pool, loss_phase=loss_phase, selection_exchange=exchange)
            run, progress = run_of(settings, engine, reference, micro_steps), Progress()
            for _ in range(2):
                with CountWaits() as waits:
                    result = train_step(run, batches(micro_steps), progress)
                    advance(progress, result, settings)
                    any_rank(False)
            assert result.applied
            found.append(((micro_steps, pool, loss_phase, exchange), waits.places))
    return found


def test_the_host_waits_for_the_device_at_most_once_a_micro_batch() -> None:
    (found,) = run_ranks(waits_of_a_step, 1)
    assert len(found) == 2 * len(POOLS) * len(LOSS_PHASES) * len(EXCHANGES)
    for (micro_steps, pool, loss_phase, exchange), places in found:
        files = [place.partition(":")[0] for place in places]
        # What is dense has nothing to repair; the rest waits to know how much it has.
        expected = [] if loss_phase == "dense" else ["weighting/cross_entropy.py"] * micro_steps
        assert files == expected, (micro_steps, pool, loss_phase, exchange, places)
