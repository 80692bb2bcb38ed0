"""The settings that depend on the step: the learning rate, and those of the objective."""

import math

from pipeline.config import Settings, TrainingSettings
from pipeline.weighting.objective import ObjectiveSettings


def learning_rate(training: TrainingSettings, applied_steps: int) -> float:
    """Linear warm-up, then half a cosine or (wsd) constant and linear decay, to final_learning_rate_fraction of the
    peak; counts applied steps."""
    peak, final = training.learning_rate, training.learning_rate * training.final_learning_rate_fraction
    if applied_steps < training.warmup_steps:
        return peak * (applied_steps + 1) / training.warmup_steps
    if training.schedule == "cosine":
        begins = training.warmup_steps
        decayed = min(1.0, (applied_steps - begins) / max(1, training.steps - begins))
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * decayed))
    begins = max(training.warmup_steps, round(training.steps * (1 - training.decay_fraction)))
    decayed = min(1.0, max(0.0, (applied_steps - begins) / max(1, training.steps - begins)))
    return peak + (final - peak) * decayed


def objective_at(settings: Settings, step: int) -> ObjectiveSettings:
    """Return the objective's settings in a step, numbered from 0 with skipped steps counted.

    A step's data is fetched and counted before the step before it runs, so that these may depend on the step's number, but not
    on what came of the steps before.
    """
    training = settings.training
    return ObjectiveSettings(training.k_percent, settings.head_weights, training.selection_pool, training.normalize_by)
