"""Evaluate on held-out data with the code that training uses: per-head losses over all valid pairs, and the objective."""

from collections.abc import Iterable, Sequence

import torch

from pipeline.config import Settings
from pipeline.consumption import settle_damage
from pipeline.data.loading.batch import Batch
from pipeline.micro_step import Models, load_micro_batches, plan, selective_losses
from pipeline.runtime.distributed import World
from pipeline.runtime.metrics import Record, SelectionSums
from pipeline.weighting.objective import loss_scale


def evaluate(
    models: Models,
    batches: Iterable[Batch],
    settings: Settings,
    source_names: Sequence[str],
    world: World,
    device: torch.device,
) -> Record:
    """Compute held-out losses over all batches of all ranks; collective, and every rank must have equally many batches.

    Returns:
        A record of metrics. `loss_head_h` is the mean over every valid pair; `loss` is the training objective, with all the
        data taken as one step. A mean with a non-finite loss in it is None.
    """
    num_heads = settings.model.num_prediction_heads
    sums = SelectionSums(num_heads, len(source_names), device)
    # The pool `step` spans the micro-steps of an optimizer step. A validation has no such steps, so it pools each micro-batch.
    pool = "global" if settings.training.selection_pool == "step" else settings.training.selection_pool
    training = settings.training.model_copy(update={"selection_pool": pool})
    num_pairs_H, first_sample, num_corrupt = [0] * num_heads, 0, 0

    # Not inference_mode: after it the trained engine's next step raises.
    with torch.no_grad():
        for batch in batches:
            micro_batches = load_micro_batches([batch], first_sample, num_heads, world.size, world.rank, device)
            first_sample += len(batch.tokens_BT) * world.size
            counts, consumed, _ = plan(micro_batches, training, settings.head_weights, len(source_names), models.group)()
            num_corrupt += len(settle_damage(consumed, [batch], settings.data, num_corrupt))
            (losses,) = selective_losses(models, micro_batches, counts, training)
            sums.add(losses, micro_batches[0].valid_BTH, micro_batches[0].batch.sources_BT)
            counted_H = counts.num_valid if training.normalize_by == "valid" else counts.num_selected_H
            num_pairs_H = [total + count for total, count in zip(num_pairs_H, counted_H, strict=True)]

    record = sums.record(loss_scale(num_pairs_H, settings.head_weights), source_names, models.group)
    # Without gradients nothing is predicted, so a hit rate would mean nothing.
    record = {key: value for key, value in record.items() if not key.startswith("prediction_hit_rate")}
    return record | {"corrupt_samples": num_corrupt}
