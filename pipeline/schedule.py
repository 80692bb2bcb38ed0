"""The settings that depend on the step: the learning rate, and those of the objective."""

import math
from collections.abc import Sequence

from pipeline.config import Settings, TrainingSettings
from pipeline.weighting.objective import ObjectiveSettings


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


def objective_at(settings: Settings, step: int) -> ObjectiveSettings:
    """Return the objective's settings in a step, numbered from 0 with skipped steps counted.

    A step's data is fetched and counted before the step before it runs, so that these may depend on the step's number, but not
    on what came of the steps before.
    """
    training = settings.training
    k_percent = 1.0 if step < training.selection_warmup_steps else k_percent_at(training, step)
    return ObjectiveSettings(k_percent, head_weights_at(settings, step), training.selection_pool, training.normalize_by)


def k_percent_at(training: TrainingSettings, step: int) -> float:
    """Return `training.k_percent` in a step, without regard to the selection's warm-up."""
    if not isinstance(training.k_percent, list):
        return training.k_percent
    pieces = [(from_step, [fraction]) for from_step, fraction in training.k_percent]
    return values_at(pieces, step, training.k_percent_change)[0]


def head_weights_at(settings: Settings, step: int) -> list[float]:
    """Return the weight of each of the H heads in a step."""
    weights, change = settings.training.head_weights, settings.training.head_weights_change
    if weights is None:
        return [1.0] * settings.model.num_prediction_heads
    pieces = [each for each in weights if isinstance(each, tuple)]
    return values_at(pieces, step, change) if pieces else [each for each in weights if not isinstance(each, tuple)]


def values_at(pieces: Sequence[tuple[int, Sequence[float]]], step: int, change: str) -> list[float]:
    """Return the values in a step of a course of `(from_step, values)`, in ascending order and the first from step 0.

    change: `stepwise`, constant from one piece to the next, or `linear` between them; the last one stays.
    """
    number = max(index for index, (from_step, _) in enumerate(pieces) if from_step <= step)
    (begins, before), *later = pieces[number:]
    if change == "stepwise" or not later:
        return list(before)

    ends, after = later[0]
    share = (step - begins) / (ends - begins)
    return [old + (new - old) * share for old, new in zip(before, after, strict=True)]
