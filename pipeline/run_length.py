"""The length of a run: steps, from `training.tokens` or `training.epochs`.

    steps = ⌈tokens / (G · T)⌉        steps = ⌈epochs · rows of an epoch / G⌉

A step's tokens are its G rows of T tokens, padding included, so that they are known before anything is read. An epoch has the
rows that the lanes read of it (`data.loading.order`).
"""

import math
from fractions import Fraction

from pipeline.config import Settings
from pipeline.data.shards.manifest import read_manifest
from pipeline.derived import lanes_of
from pipeline.model_sizes import departures


def resolution(settings: Settings) -> tuple[Settings, list[str]]:
    """Resolve a run's length; returns the settings, and sentences on what in them was not simply given: the sum behind its
    steps, and the values that are not those of `model.size`.

    Raises:
        DataError: as `with_steps`.
    """
    settings, length = with_steps(settings)
    return settings, [*departures(settings.model.size, settings.model.model_dump()), *([] if length is None else [length])]


def with_steps(settings: Settings) -> tuple[Settings, str | None]:
    """Resolve the length of a run to `training.steps`; returns the settings, and the sum where there was one to do.

    Raises:
        DataError: the data, whose rows make an epoch, cannot be read.
    """
    training, data = settings.training, settings.data
    if training.tokens is not None:
        steps = -(-training.tokens // (data.global_batch * data.sequence_length))
        text = f"{training.tokens:,} tokens / ({data.global_batch:,} rows × {data.sequence_length:,} tokens)"
    elif training.epochs is not None:
        assert data.path is not None, "refused by recipe"
        rows = read_manifest(data.path, data.access).num_samples // lanes_of(settings) * lanes_of(settings)
        steps = math.ceil(Fraction(str(training.epochs)) * rows / data.global_batch)
        text = f"{training.epochs:g} epochs × {rows:,} rows / {data.global_batch:,} rows"
    else:
        return settings, None
    resolved = settings.with_values(training={"steps": steps, "tokens": None, "epochs": None})
    return resolved, f"training.steps: {text} = {steps:,} steps"
