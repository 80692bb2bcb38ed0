"""The collectives of a step's objective, from its plan to its metrics: how many, how large, the same on every rank."""

import torch
import torch.distributed as dist

from pipeline.benchmark.measurement import Collective, CollectiveRecorder
from pipeline.config import TrainingSettings
from pipeline.micro_step import Models, load_micro_batches, plan, selective_losses
from pipeline.runtime.metrics import EXCESS_BINS, SelectionSums
from tests.integration.test_gradients import HEADS, ROWS, TOKENS, dense_model, part_of, settings_for, whole_batch
from tests.ranks import run_ranks

MICRO_STEPS, SELECTING = 2, HEADS - 1
WAYS = [(pool, exchange) for pool in ("global", "step") for exchange in ("all_gather", "radix")] + [
    ("rank", "auto"),
    ("row", "auto"),
]


def collectives_of_a_step() -> list[list[Collective]]:
    """For each way what this rank calls; the first rank begins with nothing but padding."""
    rank, group = dist.get_rank(), dist.group.WORLD
    settings = settings_for(2, MICRO_STEPS)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    rows = ROWS // 2 // MICRO_STEPS
    starts = [rank * ROWS // 2 + micro_step * rows for micro_step in range(MICRO_STEPS)]
    batches = [part_of(whole_batch(), slice(start, start + rows)) for start in starts]
    found = []
    for pool, exchange in WAYS:
        training = TrainingSettings(selection_pool=pool, selection_exchange=exchange)  # type: ignore[arg-type]
        with CollectiveRecorder() as recorder:
            micro_batches = load_micro_batches(batches, 0, HEADS, 2, rank, torch.device("cpu"))
            counts, _ = plan(micro_batches, training, [1.0] * HEADS, 2, group)
            sums = SelectionSums(HEADS, 2, torch.device("cpu"))
            losses = selective_losses(Models(policy, reference, "shifted", group), micro_batches, counts, training)
            for micro, of_micro in zip(micro_batches, losses, strict=True):
                sums.add(of_micro, micro.valid_BTH, micro.batch.sources_BT)
            sums.record(counts.scale_H, ("a", "b"), group)
        found.append(recorder.collectives)
    return found


def test_a_step_runs_one_plan_one_exchange_a_pool_and_one_reduction_of_metrics() -> None:
    padded, others = run_ranks(collectives_of_a_step, 2)
    assert padded == others
    pairs = ROWS // 2 // MICRO_STEPS * TOKENS * SELECTING

    def exchanged(name: str, micro_steps: int) -> list[Collective]:
        """The collectives of a pool of so many micro-steps."""
        if name == "all_gather":
            return [Collective("all_gather", 4 * pairs * micro_steps)]
        sizes = (2048, 2048, 1024, 2 * micro_steps)
        return [Collective("all_reduce", 4 * SELECTING * size) for size in sizes]

    for (pool, name), collectives in zip(WAYS, padded, strict=True):
        planning, *exchanges, metrics = collectives
        # What the data was is counted along: tokens, positions, damage, and two numbers for each of two sources.
        assert planning == Collective("all_reduce", 8 * (MICRO_STEPS * HEADS + HEADS + 4 + 2 * 2))
        expected = {"global": 2 * exchanged(name, 1), "step": exchanged(name, 2)}.get(pool, [])
        assert exchanges == expected, (pool, name)
        assert metrics.kind == "all_reduce"
        # Two sources, each with a histogram for each selecting head, and some sums.
        assert 0 < metrics.payload - 8 * 2 * SELECTING * EXCESS_BINS < 1000
