"""Problems between settings of the objective that are valid by themselves: what changes over time, what pairs are ranked by.

Each check yields (the settings involved, a sentence).
"""

import itertools
from collections.abc import Iterator

from pipeline.config import Settings, TrainingSettings

Problems = Iterator[tuple[set[str], str]]


def objective_inconsistencies(settings: Settings) -> Problems:
    yield from _weight_inconsistencies(settings)
    yield from _course_inconsistencies(settings.training)
    yield from _score_inconsistencies(settings)


def _weight_inconsistencies(settings: Settings) -> Problems:
    model = settings.model
    for from_step, weights in _weights_by_step(settings.training):
        begins = "" if from_step is None else f" from step {from_step} on"
        if len(weights) != model.num_prediction_heads:
            yield (
                {"training.head_weights", "model.num_prediction_heads"},
                f"training.head_weights: {len(weights)} weights for {model.num_prediction_heads} heads{begins}; give one a "
                "head",
            )
        if not any(weights):
            yield {"training.head_weights"}, f"training.head_weights: all are zero{begins}, nothing would be trained"


def _course_inconsistencies(training: TrainingSettings) -> Problems:
    """Problems of settings that change over time."""
    for key in ("head_weights", "k_percent"):
        value = getattr(training, key)
        steps = [each[0] for each in value if isinstance(each, tuple)] if isinstance(value, list) else []
        if steps and (steps[0] != 0 or any(later <= step for step, later in itertools.pairwise(steps))):
            said = ", ".join(map(str, steps))
            yield {f"training.{key}"}, f"training.{key}: from the steps {said}; expected ascending steps, the first of them 0"
        elif not steps and getattr(training, f"{key}_change") != "stepwise":
            yield (
                {f"training.{key}", f"training.{key}_change"},
                f"training.{key}_change: set, but training.{key} does not change; list it as [[from_step, value], …], or leave "
                "this out",
            )


def _weights_by_step(training: TrainingSettings) -> list[tuple[int | None, list[float]]]:
    """(from_step, weights of the heads) of each piece; the only one of constant weights has no step."""
    pieces: list[tuple[int | None, list[float]]] = [each for each in training.head_weights or () if isinstance(each, tuple)]
    constant = [each for each in training.head_weights or () if not isinstance(each, tuple)]
    return pieces if pieces or training.head_weights is None else [(None, constant)]


def _score_inconsistencies(settings: Settings) -> Problems:
    """Problems of what the pairs are ranked by."""
    training, reference = settings.training, settings.reference
    is_external = training.selection_score == "external"
    scores = {"training.selection_score", "training.external_scores"}
    if is_external and training.external_scores is None:
        yield scores, "training.external_scores: not set; name the directory that launch/score.py --import has made"
    if not is_external and training.external_scores is not None:
        yield (
            scores,
            f"training.external_scores: set, but training.selection_score is '{training.selection_score}'; set it to external",
        )
    if is_external and reference.cached is not None:
        yield (
            scores | {"reference.cached"},
            "reference.cached: set, and so is training.external_scores; only one of them is read beside the data: write "
            "reference.cached=null",
        )
    for key in ("path", "cached", "training_steps") if reference.horizon == "own" else ():
        if getattr(reference, key) is not None:
            yield (
                {"reference.horizon", f"reference.{key}"},
                f"reference.{key}: set, but reference.horizon 'own' takes the policy's head 0 for the reference; write "
                f"reference.{key}=null, or another horizon",
            )
