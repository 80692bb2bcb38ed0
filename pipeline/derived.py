"""Values derived from the settings and the files they name: lanes, the reference's shape, its cached losses."""

from pathlib import Path
from typing import Any

from pipeline.config import ModelSettings, Settings
from pipeline.data.loading.order import default_lanes
from pipeline.data.shards.manifest import MANIFEST_FILE
from pipeline.data.shards.reference_losses import CachedLosses, data_fingerprint, find_losses
from pipeline.model.huggingface import read_model_settings
from pipeline.runtime.deepspeed_json import precision_of
from pipeline.storage.files import read_whole
from pipeline.storage.location import Location


def lanes_of(settings: Settings) -> int:
    """L, the number of lanes: `data.lanes`, or the default for the global batch."""
    return settings.data.lanes or default_lanes(settings.data.global_batch)


def vocab_size_of(settings: Settings, needed: int) -> int:
    """V: as set, else as the pretrained weights have it, else the ids that the data needs.

    Models often have more rows than their tokenizer has ids, to a multiple of 64 or 128, and keep them.

    Raises:
        ModelFilesError: as `read_model_settings`.
    """
    if settings.model.vocab_size is not None or settings.model.pretrained is None:
        return settings.model.vocab_size or needed
    return read_model_settings(settings.model.pretrained).vocab_size or needed


def next_token_model(shape: ModelSettings) -> ModelSettings:
    """The same model with the next-token head alone."""
    return shape.model_copy(update={"num_prediction_heads": 1})


def has_selecting_heads(settings: Settings) -> bool:
    """True if the model has heads that select; with head 0 alone there is nothing to compare with a reference."""
    return settings.model.num_prediction_heads > 1


def reference_shape(settings: Settings, include_untrained: bool = False) -> ModelSettings | None:
    """Shape of the live reference model; None for a run without one (no selecting heads, or cached losses).

    It is read from the reference's files, with the next-token head alone unless `reference.horizon` is `matched`.
    include_untrained: also return the shape of a reference that the job is yet to train.
    """
    if not has_selecting_heads(settings) or settings.reference.cached is not None or settings.reference.horizon == "own":
        return None
    if settings.reference.path is not None:
        shape = read_model_settings(settings.reference.path)
        return shape if settings.reference.horizon == "matched" else next_token_model(shape)
    return next_token_model(settings.model) if include_untrained and settings.reference.training_steps is not None else None


def cache_of(settings: Settings) -> tuple[str, Path | None]:
    """The directory of what is read beside the data, cached losses or external scores, and the setting that names it."""
    if settings.training.selection_score == "external":
        return "training.external_scores", settings.training.external_scores
    return "reference.cached", settings.reference.cached


def cached_losses(
    settings: Settings, location: Location, config: dict[str, Any], reference_sha256: str | None
) -> CachedLosses | None:
    """Find the cached reference losses, or the external scores, of the data set at `location`; None if none are to be read.

    Args:
        config: the resolved DeepSpeed configuration, for the precision.
        reference_sha256: fingerprint that the reference must have; None to accept any.

    Raises:
        DataError: the cache has no losses for this data, or none computed under these settings.
    """
    _, cache = cache_of(settings)
    if cache is None:
        return None
    horizon: str = settings.reference.horizon
    is_external = settings.training.selection_score == "external"
    return find_losses(
        cache,
        data_fingerprint(read_whole(location / MANIFEST_FILE, settings.data.access)),
        str(location),
        horizon="external" if is_external else horizon,
        columns=settings.model.num_prediction_heads if horizon == "matched" and not is_external else 1,
        precision=None if is_external else precision_of(config),
        reference_sha256=None if is_external else reference_sha256,
    )
