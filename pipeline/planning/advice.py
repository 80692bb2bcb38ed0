"""Whether a plan fits a device, and which setting brings how much.

A plan is tested to lie within 15 % of the measured peak (tests/integration/test_memory_plan.py), so only what fits with that
margin is said to fit. Of a GPU's memory a part is nobody's to plan: CUDA's context, NCCL's buffers, and what lies free between
the allocator's blocks.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.checks import size_problems
from pipeline.planning.case import Case
from pipeline.planning.plan import Plan, plan_memory

MARGIN = 0.15
ASIDE_ON_GPU = 2 * 2**30
"""Bytes of a GPU that the plan leaves out. Not measured here: 1.5 to 3 GB are common."""


class Change(NamedTuple):
    """setting: what to write, and its price. total: bytes on the device with it alone."""

    setting: str
    total: int


def plannable(case: Case, device_bytes: float) -> float:
    """Bytes of a device that there are for what is planned."""
    return device_bytes - (ASIDE_ON_GPU if case.on_gpu else 0)


def verdict(plan: Plan, device_bytes: float) -> str:
    """`fits`, `close` (only if the plan is not too small) or `does not fit` so many plannable bytes."""
    if plan.total * (1 + MARGIN) <= device_bytes:
        return "fits"
    return "close" if plan.total <= device_bytes else "does not fit"


def changes(case: Case) -> list[Change]:
    """Every change that saves at least a hundredth of the plan and that a plan would accept, the largest saving first."""
    now = plan_memory(case).total
    tried = [
        Change(setting, plan_memory(changed).total)
        for setting, changed in _candidates(case)
        if not size_problems(changed.settings, changed.num_ranks)
    ]
    return sorted((change for change in tried if change.total < 0.99 * now), key=lambda change: change.total)


def _candidates(case: Case) -> Iterator[tuple[str, Case]]:
    settings = case.settings
    data, training = settings.data, settings.training
    checkpointing = {"selective": "a few per cent more work", "full": "a third more work"}
    kinds = ["none", *checkpointing]
    for kind in kinds[kinds.index(training.activation_checkpointing) + 1 :]:
        yield (
            f"training.activation_checkpointing={kind} ({checkpointing[kind]})",
            case.changed({"training": {"activation_checkpointing": kind}}),
        )
    if data.micro_batch % 2 == 0:
        half = data.micro_batch // 2
        yield f"data.micro_batch={half} (twice the micro-steps)", case.changed({"data": {"micro_batch": half}})
    if training.loss_phase == "dense":
        yield "training.loss_phase=predicted (and faster)", case.changed({"training": {"loss_phase": "predicted"}})
    if case.reference is not None:
        if case.sharding == "replicate" and case.num_ranks > 1:
            yield "reference.sharding=zero3 (more communication)", case.changed(sharding="zero3")
        yield "reference.cached=DIR (launch/score.py makes it, once)", case.changed(reference=None)
    for stage in range(case.stage + 1, 4):
        yield f'"stage": {stage} in the DeepSpeed JSON (more communication)', case.changed(zero={"stage": stage})
    if case.on_gpu and not case.offloads_optimizer:
        yield (
            '"offload_optimizer": {"device": "cpu"} in the DeepSpeed JSON (the step waits for the host)',
            case.changed(zero={"offload_optimizer": {"device": "cpu"}}),
        )
    yield from _smaller_window(case)
    yield f"--gpus {2 * case.num_ranks} (half the micro-steps)", case.changed(num_ranks=2 * case.num_ranks)


def _smaller_window(case: Case) -> Iterator[tuple[str, Case]]:
    """Fewer gathered weights at a time, where that is not all there are."""
    if case.stage != 3 or case.num_ranks == 1:
        return
    few = 10**8
    window = {"stage3_max_live_parameters": few, "stage3_max_reuse_distance": few}
    if case.zero.max_live_parameters > few or case.zero.max_reuse_distance > few:
        yield (
            f'"stage3_max_live_parameters" and "stage3_max_reuse_distance": {few} in the DeepSpeed JSON (weights are gathered '
            "later, and twice)",
            case.changed(zero=window),
        )
