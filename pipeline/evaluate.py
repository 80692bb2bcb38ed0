"""Evaluate on held-out data with the code that training uses: per-head losses over all valid pairs, and the objective."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config import Settings
from pipeline.consumption import handle_damage
from pipeline.data.loading.batch import Batch
from pipeline.micro_step import Models, comparisons, count_step, load_micro_batches, policy_losses, selectors_of
from pipeline.runtime.distributed import World
from pipeline.runtime.metrics import Record, SelectionSums
from pipeline.weighting.objective import ObjectiveSettings, loss_scale
from pipeline.weighting.prediction import Prediction


def evaluate(
    models: Models,
    batches: Iterable[Batch],
    settings: Settings,
    objective: ObjectiveSettings,
    source_names: Sequence[str],
    world: World,
    device: torch.device,
) -> Record:
    """Compute held-out losses over all batches of all ranks; collective, and every rank must have equally many batches.

    Returns:
        A record of metrics. `loss_head_h` is the mean over every valid pair; `loss` is the training objective, with all the
        data taken as one step. A mean with a non-finite loss in it is None.
    """
    num_heads, training = settings.model.num_prediction_heads, settings.training
    sums = SelectionSums(num_heads, len(source_names), device)
    # The pool `step` spans the micro-steps of an optimizer step. A validation has no such steps, so it pools each micro-batch.
    objective = replace(objective, pool="global" if objective.pool == "step" else objective.pool)
    num_pairs_H, first_sample, num_corrupt = [0] * num_heads, 0, 0

    # Not inference_mode: after it the trained engine's next step raises.
    with torch.no_grad():
        for batch in batches:
            # Data: on the device, counted, damage agreed.
            micro_batches = load_micro_batches([batch], first_sample, num_heads, world.size, world.rank, device)
            first_sample += len(batch.tokens_BT) * world.size
            counts, consumed, _ = count_step(micro_batches, objective, len(source_names), models.group).read()
            num_corrupt += len(handle_damage(consumed, [batch], settings.data, num_corrupt))

            # Losses, as in training; without gradients nothing is gained by predicting.
            compared = comparisons(models, micro_batches, training)
            selectors = selectors_of(models, micro_batches, compared, counts, training, Prediction())
            (losses,) = policy_losses(models, micro_batches, selectors, counts, training)

            # Sums, and the pairs by which the objective is divided.
            sums.add(losses, micro_batches[0].valid_BTH, micro_batches[0].batch.sources_BT)
            counted_H = counts.num_valid if objective.normalize_by == "valid" else counts.num_selected_H
            num_pairs_H = [total + count for total, count in zip(num_pairs_H, counted_H, strict=True)]

    record = sums.record(loss_scale(num_pairs_H, objective.head_weights), source_names, models.group)
    # Without gradients nothing is predicted, so a hit rate would mean nothing.
    record = {key: value for key, value in record.items() if not key.startswith("prediction_hit_rate")}
    return record | {"corrupt_samples": num_corrupt}


def losses_of_batch(policy: Callable[..., Tensor], batch: Batch, num_heads: int, device: torch.device) -> list[float]:
    """Compute each head's mean loss over the valid pairs of one batch, which is the same on all ranks; collective."""
    (micro,) = load_micro_batches([batch], 0, num_heads, 1, 0, device)
    with torch.no_grad():
        loss_BTH = policy(*micro.inputs, **micro.known)
    sums_H = loss_BTH.where(micro.valid_BTH, 0.0).double().sum((0, 1))
    return (sums_H / micro.valid_BTH.sum((0, 1)).clamp(min=1)).tolist()
