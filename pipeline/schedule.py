"""The learning rate over the steps of a run."""

import math

from pipeline.config import TrainingSettings


def learning_rate(training: TrainingSettings, applied_steps: int) -> float:
    """Learning rate of the next update after `applied_steps` updates.

    Linear warm-up to the peak; then `cosine` decays along half a cosine, and `wsd` (warm-up, stable, decay; arXiv 2404.06395)
    stays constant until its linear decay. Both end at final_learning_rate_fraction of the peak.
    """
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
