"""Judge whether a plan fits a device, and compute how much memory each setting would save.

A plan is tested to lie within 15 % of the measured peak (tests/integration/test_memory_plan.py), so only a plan that fits with
that margin is said to fit. Some of a GPU's memory cannot be planned: CUDA's context, NCCL's buffers, the allocator's
fragmentation.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.checks import size_problems
from pipeline.planning.plan import Plan, plan_memory
from pipeline.planning.planned_job import PlannedJob

MARGIN = 0.15
"""Relative error that a plan may have."""
GPU_OVERHEAD_BYTES = 2 * 2**30
"""Bytes of a GPU set aside for what the plan leaves out. Not measured here: 1.5 to 3 GB are common."""


class Saving(NamedTuple):
    """A setting that saves memory. setting: its text and its price. total: bytes on the device with this change alone."""

    setting: str
    total: int


def usable_bytes(job: PlannedJob, device_bytes: float) -> float:
    """Bytes of a device that the plan may use."""
    return device_bytes - (GPU_OVERHEAD_BYTES if job.on_gpu else 0)


def verdict(plan: Plan, device_bytes: float) -> str:
    """Judge a plan against `device_bytes` usable bytes: `fits`, `close` (fits without the margin) or `does not fit`."""
    if plan.total * (1 + MARGIN) <= device_bytes:
        return "fits"
    return "close" if plan.total <= device_bytes else "does not fit"


def savings(job: PlannedJob) -> list[Saving]:
    """List the changes that save at least 1 % of the plan and are valid settings, the largest saving first."""
    now = plan_memory(job).total
    tried = [
        Saving(setting, plan_memory(changed).total)
        for setting, changed in _candidates(job)
        if not size_problems(changed.settings, changed.num_ranks)
    ]
    return sorted((saving for saving in tried if saving.total < 0.99 * now), key=lambda saving: saving.total)


def _candidates(job: PlannedJob) -> Iterator[tuple[str, PlannedJob]]:
    settings = job.settings
    data, training = settings.data, settings.training

    # The step: checkpointing stronger than now, fewer rows at a time, the loss phase.
    checkpointing = {"selective": "a few per cent more work", "full": "a third more work"}
    kinds = ["none", *checkpointing]
    for kind in kinds[kinds.index(training.activation_checkpointing) + 1 :]:
        yield (
            f"training.activation_checkpointing={kind} ({checkpointing[kind]})",
            job.changed({"training": {"activation_checkpointing": kind}}),
        )
    if data.rows_per_rank % 2 == 0:
        half = data.rows_per_rank // 2
        yield f"data.micro_batch={half} (twice the micro-steps)", job.changed({"data": {"micro_batch": half}})
    if training.loss_phase == "dense":
        yield "training.loss_phase=predicted (and faster)", job.changed({"training": {"loss_phase": "predicted"}})

    # The reference: partitioned, or replaced by its cached losses.
    if job.reference is not None:
        if job.sharding == "replicate" and job.num_ranks > 1:
            yield "reference.sharding=zero3 (more communication)", job.changed(sharding="zero3")
        yield "reference.cached=DIR (launch/score.py makes it, once)", job.changed(reference=None)

    # DeepSpeed: a higher stage, offloading, less gathered at a time; and more ranks.
    for stage in range(job.stage + 1, 4):
        yield f'"stage": {stage} in the DeepSpeed JSON (more communication)', job.changed(zero={"stage": stage})
    if job.on_gpu and not job.offloads_optimizer:
        yield (
            '"offload_optimizer": {"device": "cpu"} in the DeepSpeed JSON (the step waits for the host)',
            job.changed(zero={"offload_optimizer": {"device": "cpu"}}),
        )
    yield from _smaller_window(job)
    yield f"--gpus {2 * job.num_ranks} (half the micro-steps)", job.changed(num_ranks=2 * job.num_ranks)


def _smaller_window(job: PlannedJob) -> Iterator[tuple[str, PlannedJob]]:
    """Smaller limits on the weights that ZeRO-3 keeps gathered, if they are larger than 10⁸ values."""
    if job.stage != 3 or job.num_ranks == 1:
        return
    few = 10**8
    window = {"stage3_max_live_parameters": few, "stage3_max_reuse_distance": few}
    if job.zero.max_live_parameters > few or job.zero.max_reuse_distance > few:
        yield (
            f'"stage3_max_live_parameters" and "stage3_max_reuse_distance": {few} in the DeepSpeed JSON (weights are gathered '
            "later, and twice)",
            job.changed(zero=window),
        )
