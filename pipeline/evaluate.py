"""Held-out losses, through the training's own loss code: per head without selection, and the objective with it."""

from collections.abc import Iterable, Sequence

import torch

from pipeline.config import Settings
from pipeline.data.batch import Batch
from pipeline.micro_step import Models, load_micro_batch, plan, selective_losses
from pipeline.runtime.metrics import Record, SelectionSums
from pipeline.weighting.objective import loss_scale


def evaluate(
    models: Models, batches: Iterable[Batch], settings: Settings, source_names: Sequence[str], device: torch.device
) -> Record:
    """Losses over all `batches` of all ranks, every rank having equally many. `loss_head_h` counts every valid pair,
    `loss` is the training objective with the whole of the data as one step."""
    num_heads = settings.model.num_prediction_heads
    sums = SelectionSums(num_heads, len(source_names), device)
    num_pairs_AH = []
    # Not inference_mode: its tensors would poison the trained engine's next step.
    with torch.no_grad():
        for batch in batches:
            micro = load_micro_batch(batch, num_heads, device)
            counts = plan([micro], settings.training, settings.head_weights, models.group)
            losses = selective_losses(models, micro, counts.num_selected_AH[0], counts.scale_H)
            sums.add(losses, micro.valid_BTH, batch.sources_BT.to(device), counts.num_valid_AH[0])
            by_valid = settings.training.normalize_by == "valid"
            num_pairs_AH.append((counts.num_valid_AH if by_valid else counts.num_selected_AH)[0])
    return sums.record(loss_scale(num_pairs_AH, settings.head_weights), source_names, models.group)
