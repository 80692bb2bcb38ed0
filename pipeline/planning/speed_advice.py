"""List the settings that make a job faster: what each would bring, and the memory that it takes."""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.checks import size_problems
from pipeline.planning.hardware import Hardware
from pipeline.planning.plan import plan_memory
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.speed import plan_speed

LEAST_GAIN = 0.01
"""Share of the speed that a change must bring to be listed."""


class Gain(NamedTuple):
    """A setting that makes a job faster. tokens_per_second: over all ranks, with this change alone. total: bytes of a rank."""

    setting: str
    tokens_per_second: float
    total: int


def gains(job: PlannedJob, hardware: Hardware) -> list[Gain]:
    """List the changes that are valid and bring at least `LEAST_GAIN`, the largest gain first."""
    now = plan_speed(job, hardware).tokens_per_second
    tried = [
        Gain(setting, plan_speed(changed, hardware).tokens_per_second, plan_memory(changed).total)
        for setting, changed in _candidates(job, hardware)
        if not size_problems(changed.settings, changed.num_ranks)
    ]
    faster = [gain for gain in tried if gain.tokens_per_second >= (1 + LEAST_GAIN) * now]
    return sorted(faster, key=lambda gain: -gain.tokens_per_second)


def _candidates(job: PlannedJob, hardware: Hardware) -> Iterator[tuple[str, PlannedJob]]:
    training = job.settings.training

    # The step: more rows at a time, less that is computed twice.
    rows = 2 * job.settings.data.rows_per_rank
    if job.micro_steps > 1:
        yield f"data.micro_batch={rows}", job.changed({"data": {"micro_batch": rows}})
    kinds = ["none", "selective", "full"]
    for kind in kinds[: kinds.index(training.activation_checkpointing)]:
        yield (
            f"training.activation_checkpointing={kind}",
            job.changed({"training": {"activation_checkpointing": kind}}),
        )
    if training.loss_phase != "predicted":
        yield "training.loss_phase=predicted", job.changed({"training": {"loss_phase": "predicted"}})

    # The reference: its losses cached, or its weights whole.
    if job.reference is not None:
        yield "reference.cached=DIR (launch/score.py makes it, once)", job.changed(reference=None)
        if job.sharding == "zero3" and job.num_ranks > 1:
            yield "reference.sharding=replicate", job.changed(sharding="replicate")
    yield from _deepspeed_candidates(job, hardware)


def _deepspeed_candidates(job: PlannedJob, hardware: Hardware) -> Iterator[tuple[str, PlannedJob]]:
    for stage in range(1, job.stage):
        yield f'"stage": {stage} in the DeepSpeed JSON', job.changed(zero={"stage": stage})
    if job.offloads_optimizer:
        yield "no offload_optimizer in the DeepSpeed JSON", job.changed(zero={"offload_optimizer": {"device": "none"}})
    if not job.zero.overlap_comm:
        yield '"overlap_comm": true in the DeepSpeed JSON', job.changed(zero={"overlap_comm": True})
    if job.stage != 3 or job.num_ranks == 1:
        return
    node = hardware.node_ranks
    if int(job.zero.zero_hpz_partition_size) == 1 and job.num_ranks > node and job.num_ranks % node == 0:
        yield (
            f'"zero_hpz_partition_size": {node} (ds_configs/zero3_hpz.json)',
            job.changed(zero={"zero_hpz_partition_size": node}),
        )
    limits = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), job.num_parameters)
    if min(int(job.zero.max_live_parameters), int(job.zero.max_reuse_distance)) < job.num_parameters:
        yield (
            f'"stage3_max_live_parameters" and "stage3_max_reuse_distance": {job.num_parameters} in the DeepSpeed JSON',
            job.changed(zero=limits),
        )
