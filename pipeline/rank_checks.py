"""What all ranks must hold alike after a step, and compare at intervals."""

from typing import Any

import torch
from torch import Tensor

from pipeline.config import TrainingSettings
from pipeline.progress import Progress
from pipeline.run import Run, StepResult
from pipeline.runtime.agreement import checksum
from pipeline.runtime.engine import Engine, gradient_norm, whole_parameters
from pipeline.weighting.pools import SHARED_POOLS


def is_check_due(training: TrainingSettings, step: int) -> bool:
    """Return whether the ranks are compared after this step, which is counted from 1."""
    return training.check_ranks_every is not None and step % training.check_ranks_every == 0


def checksums_of(run: Run) -> dict[str, Tensor]:
    """Compute checksums of the weights of which every rank has a copy, by name; nothing waits for the device."""
    whole = {f"parameter {name}": weight for name, weight in whole_parameters(run.engine).items()}
    if isinstance(run.models.reference, Engine):
        whole |= {f"reference's {name}": weight for name, weight in whole_parameters(run.models.reference).items()}
    return {name: checksum(weight) for name, weight in whole.items()}


def common_values(run: Run, progress: Progress, result: StepResult) -> dict[str, Any]:
    """Collect the values that all ranks must hold alike after a step."""
    training = run.settings.training
    values: dict[str, Any] = {
        "progress": progress.to_json(),
        "learning rate": result.learning_rate,
        "gradient norm": gradient_norm(run.engine),
    }
    if training.selection_pool in SHARED_POOLS:
        values["thresholds"] = [threshold_K.tolist() for threshold_K in result.sums.thresholds]
    if result.checksums:
        numbers = torch.stack(list(result.checksums.values())).tolist()
        values |= dict(zip(result.checksums, numbers, strict=True))
    return values
