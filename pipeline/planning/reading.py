"""From a recipe, a DeepSpeed JSON and a number of GPUs to what is planned.

Neither data nor reference need be there: a vocabulary may be set, a reference that is somewhere else is taken to have the
policy's shape, and what had to be assumed is said.
"""

from typing import Any

from pipeline.config import ModelSettings, Settings
from pipeline.derived import next_token_model, reference_shape
from pipeline.model.huggingface import ModelFilesError
from pipeline.planning import states
from pipeline.planning.case import Case, parameter_sizes
from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
from pipeline.runtime.memory import sharding_that_fits


def case_of(
    settings: Settings, content: dict[str, Any], num_ranks: int, on_gpu: bool, device_bytes: float | None
) -> tuple[Case, list[str]]:
    """The case, and a sentence for everything that was assumed; `content` is the JSON's as it was given, `device_bytes` what a
    rank's device has, None where that is not known."""
    notes: list[str] = []
    if content.get("bf16", {}).get("enabled") == "auto":
        content = content | {"bf16": {"enabled": on_gpu}}
    case = Case(settings, resolve_deepspeed_json(content, settings, num_ranks), num_ranks, on_gpu, None, "replicate")
    shape = _reference_shape(settings, notes)
    if shape is None:
        return case, notes
    return case.changed(reference=shape, sharding=_sharding(case, shape, device_bytes, notes)), notes


def _reference_shape(settings: Settings, notes: list[str]) -> ModelSettings | None:
    try:
        return reference_shape(settings, stand_in=True)
    except ModelFilesError:
        notes.append(
            f"reference.path: {settings.reference.path} cannot be read here; a reference of the policy's shape is assumed"
        )
        return settings.model if settings.reference.horizon == "matched" else next_token_model(settings.model)


def _sharding(case: Case, shape: ModelSettings, device_bytes: float | None, notes: list[str]) -> str:
    """As `assembly.frozen_reference` will decide, when the policy is built and its optimiser has no states yet."""
    asked = case.settings.reference.sharding
    if asked != "auto":
        return asked
    if device_bytes is None:
        notes.append(
            "reference.sharding: auto, and the device's memory is not known; a whole reference on each rank is assumed"
        )
        return "replicate"
    # Of an optimiser that is offloaded nothing lies on the device.
    master = 0 if case.offloads_optimizer else states.master_weights(case) + states.gradients_at_rest(case)
    weights = 0 if case.offloads_parameters else states.weights(case)
    built = weights + master + states.buckets_at_rest(case)
    return sharding_that_fits(case.width * sum(parameter_sizes(shape)), device_bytes - built)
