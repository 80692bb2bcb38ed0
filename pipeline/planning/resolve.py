"""Resolve a recipe, a DeepSpeed JSON and a number of ranks into a `PlannedJob`.

Neither the data nor the reference need exist on this machine: the vocabulary may be set, and a reference that cannot be read is
assumed to have the policy's shape. Every assumption is returned as a note for the user.
"""

from typing import Any

from pipeline.config import ModelSettings, Settings
from pipeline.derived import next_token_model, reference_shape
from pipeline.model.huggingface import ModelFilesError
from pipeline.planning import states
from pipeline.planning.planned_job import PlannedJob, parameter_sizes
from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
from pipeline.runtime.memory import sharding_that_fits


def resolve_planned_job(
    settings: Settings, content: dict[str, Any], num_ranks: int, on_gpu: bool, device_bytes: float | None
) -> tuple[PlannedJob, list[str]]:
    """Resolve the job to plan; returns it with one sentence for every assumption.

    Args:
        content: the DeepSpeed JSON as given.
        device_bytes: memory of a rank's device; None if unknown.
    """
    notes: list[str] = []
    if content.get("bf16", {}).get("enabled") == "auto":
        content = content | {"bf16": {"enabled": on_gpu}}
    job = PlannedJob(settings, resolve_deepspeed_json(content, settings, num_ranks), num_ranks, on_gpu, None, "replicate")
    shape = _reference_shape(settings, notes)
    if shape is None:
        return job, notes
    return job.changed(reference=shape, sharding=_sharding(job, shape, device_bytes, notes)), notes


def _reference_shape(settings: Settings, notes: list[str]) -> ModelSettings | None:
    try:
        return reference_shape(settings, include_untrained=True)
    except ModelFilesError as error:
        notes.append(
            f"reference.path: {settings.reference.path} cannot be read here; a reference of the policy's shape is assumed "
            f"({error})"
        )
        return settings.model if settings.reference.horizon == "matched" else next_token_model(settings.model)


def _sharding(job: PlannedJob, shape: ModelSettings, device_bytes: float | None, notes: list[str]) -> str:
    """Predict how `assembly.build_frozen_reference` will shard the reference.

    It decides when the policy is built and its optimizer has no states yet.
    """
    asked = job.settings.reference.sharding
    if asked != "auto":
        return asked
    if device_bytes is None:
        notes.append(
            "reference.sharding: auto, and the device's memory is not known; a whole reference on each rank is assumed"
        )
        return "replicate"
    # An offloaded optimizer has nothing on the device.
    master = 0 if job.offloads_optimizer else states.master_weights(job) + states.gradients_at_rest(job)
    weights = 0 if job.offloads_parameters else states.weights(job)
    built = weights + master + states.buckets_at_rest(job)
    return sharding_that_fits(job.dtype_bytes * sum(parameter_sizes(shape)), device_bytes - built)
