"""What follows from the settings and the files that they name: lanes, the shape of the reference, its cached losses."""

from typing import Any

from pipeline.config import ModelSettings, Settings
from pipeline.data.loading.order import default_lanes
from pipeline.data.shards.manifest import MANIFEST_FILE
from pipeline.data.shards.reference_losses import CachedLosses, data_fingerprint, find_losses
from pipeline.model.huggingface import read_model_settings
from pipeline.runtime.deepspeed_json import precision_of
from pipeline.runtime.identity import model_fingerprint
from pipeline.storage.files import read_whole
from pipeline.storage.location import Location


def lanes_of(settings: Settings) -> int:
    return settings.data.lanes or default_lanes(settings.data.global_batch)


def next_token_model(shape: ModelSettings) -> ModelSettings:
    """The same model without its further heads."""
    return shape.model_copy(update={"num_prediction_heads": 1})


def has_selecting_heads(settings: Settings) -> bool:
    """Whether there is anything to compare with a reference: one head selects nothing."""
    return settings.model.num_prediction_heads > 1


def reference_shape(settings: Settings, include_untrained: bool = False) -> ModelSettings | None:
    """The shape of the reference model that runs along: that of its files, with the next-token head alone unless all are
    asked; None for a run without, as with cached losses. A `stand_in` has the shape of one that is still to be trained."""
    if not has_selecting_heads(settings) or settings.reference.cached is not None:
        return None
    if settings.reference.path is not None:
        shape = read_model_settings(settings.reference.path)
        return shape if settings.reference.horizon == "matched" else next_token_model(shape)
    return next_token_model(settings.model) if include_untrained and settings.reference.training_steps is not None else None


def cached_losses(settings: Settings, place: Location, config: dict[str, Any]) -> CachedLosses | None:
    """The reference losses that are cached for the data set at `place`; None where the settings name no cache. `config` is
    the resolved DeepSpeed configuration.

    Raises:
        DataError: the cache holds none for this data, or none that these settings could have made.
    """
    reference = settings.reference
    if reference.cached is None:
        return None
    return find_losses(
        reference.cached,
        data_fingerprint(read_whole(place / MANIFEST_FILE, settings.data.access)),
        str(place),
        horizon=reference.horizon,
        columns=settings.model.num_prediction_heads if reference.horizon == "matched" else 1,
        precision=precision_of(config),
        reference_sha256=None if reference.path is None else model_fingerprint(reference.path),
    )
