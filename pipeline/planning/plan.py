"""The memory plan: the moment of a step at which a rank needs most memory, split into parts.

Memory can peak at a few moments of a step:

- the loss phase: all activations are saved, and the loss's buffers are allocated;
- the start of backward: the final norm's gradients;
- a block's backward: a checkpointed block is recomputed;
- the end of backward: the embedding's gradient;
- the reduction of gradients;
- the optimizer's step;
- building the model, where it is whole on each rank (stages 1 and 2).

The plan computes all of them and takes the highest.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.planning import activations, states
from pipeline.planning.planned_job import PlannedJob

PARTS = (
    "parameters", "gathered parameters", "master weights", "optimiser", "gradients", "reduce buckets", "activations",
    "loss phase", "reference", "checkpoint copies",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Memory of one rank, in bytes.

    at_rest: by part, on the device between two steps.
    moments: by moment and part, on the device, `at_rest` included.
    host: by part, in host memory because it is offloaded.
    checkpoint_copies: in host memory, kept from the start on, so that checkpoints are written in the background.
    """

    at_rest: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: dict[str, int]
    checkpoint_copies: int

    @property
    def peak_moment(self) -> str:
        """The moment at which most memory is needed."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> dict[str, int]:
        return self.moments[self.peak_moment]

    @property
    def total(self) -> int:
        return sum(self.peak.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def plan_memory(job: PlannedJob) -> Plan:
    """Compute the memory plan of one rank."""
    # Between steps, on the device or, offloaded, on the host.
    held = {
        "parameters": states.weights(job),
        "master weights": states.master_weights(job),
        "optimiser": states.optimizer(job),
        "gradients": states.gradients_at_rest(job),
        "reduce buckets": states.buckets_at_rest(job),
        "reference": states.reference(job),
    }
    host: dict[str, int] = {}
    if job.offloads_optimizer:
        host |= {part: held.pop(part) for part in ("master weights", "optimiser", "gradients")}
    if job.offloads_parameters:
        host["parameters"] = held.pop("parameters")

    # Parameters below the persistence threshold stay gathered under ZeRO-3.
    resident = states.persistent_parameters(job, job.parameter_sizes) if job.stage == 3 and job.num_ranks > 1 else 0
    at_rest = held | {"gathered parameters": resident + states.node_partition(job, job.parameter_sizes)}

    # What each moment adds to that.
    moments = {name: _sum_parts(at_rest, moment(job)) for name, moment in _MOMENTS.items()}
    if job.stage != 3:
        # The model as it was built, and the flat copy that DeepSpeed replaces it with.
        moments["building"] = {"parameters": 2 * states.weights(job)}
    return Plan(at_rest, moments, host, states.checkpoint_copies(job))


def _sum_parts(at_rest: dict[str, int], added: dict[str, int]) -> dict[str, int]:
    """Add two dicts part by part; parts of zero bytes are left out."""
    both = {part: at_rest.get(part, 0) + added.get(part, 0) for part in PARTS}
    return {part: size for part, size in both.items() if size}


def _gathered_beyond_persistent(job: PlannedJob) -> int:
    return max(0, states.gathered_parameters(job) - states.persistent_parameters(job, job.parameter_sizes))


def _loss_phase(job: PlannedJob) -> dict[str, int]:
    return {
        "gathered parameters": _gathered_beyond_persistent(job),
        "gradients": states.gradients_accumulated(job),
        "activations": activations.saved_for_backward(job),
        "loss phase": activations.head_outputs(job) + activations.final_norm(job) + activations.loss_phase(job),
    }


def _start_of_backward(job: PlannedJob) -> dict[str, int]:
    dense = job.settings.training.loss_phase == "dense"
    at_work = activations.dense_loss_backward(job) if dense else activations.norm_backward(job)
    alone = states.exceeds_bucket(job)
    return {
        "gathered parameters": _gathered_beyond_persistent(job),
        "gradients": states.gradients_accumulated(job) + _unembedding_gradient(job),
        "reduce buckets": _buckets_beyond_rest(job, 0 if alone else job.embedding_size),
        "activations": activations.saved_for_backward(job),
        "loss phase": activations.head_outputs(job) + activations.final_norm(job) + at_work,
    }


def _first_reduction(job: PlannedJob) -> dict[str, int]:
    """The reduction of an unembedding's gradient that exceeds a bucket; it starts when the final norm's gradient comes."""
    if not states.exceeds_bucket(job) or states.is_bf16_optimizer(job):
        return {}
    return {
        "gathered parameters": _gathered_beyond_persistent(job),
        "gradients": states.gradients_in_backward(job) + _unembedding_gradient(job),
        "reduce buckets": _buckets_beyond_rest(job, 0) + states.unbucketed_reduction(job),
        "activations": activations.saved_for_backward(job) + activations.head_outputs(job),
    }


def _head_backward(job: PlannedJob) -> dict[str, int]:
    return {
        "gathered parameters": _gathered_beyond_persistent(job),
        "gradients": states.gradients_in_backward(job) + _unreduced_gradient(job),
        "reduce buckets": _buckets_beyond_rest(job, 2 * job.embedding_size) + states.reduction_buffers(job),
        "activations": activations.saved_for_backward(job) + activations.block_backward(job),
    }


def _end_of_backward(job: PlannedJob) -> dict[str, int]:
    own = 0 if _unreduced_gradient(job) else job.dtype_bytes * job.embedding_size
    return {
        "gathered parameters": job.dtype_bytes * job.embedding_size if _gathered_beyond_persistent(job) else 0,
        "gradients": states.gradients_after_backward(job) + own,
        "reduce buckets": _buckets_beyond_rest(job, job.num_parameters) + states.reduction_buffers(job),
        "activations": activations.block_input(job) * 2 + activations.detached_gradient(job),
    }


def _whole_reduction(job: PlannedJob) -> dict[str, int]:
    if not states.is_bf16_optimizer(job):
        return {}
    return {"gradients": states.gradients_after_backward(job), "reduce buckets": states.bf16_optimizer_reduction(job)}


def _unembedding_gradient(job: PlannedJob) -> int:
    """The unembedding's gradient, where it is not moved into a bucket as soon as it is computed."""
    kept = states.exceeds_bucket(job) or states.is_bf16_optimizer(job)
    return job.dtype_bytes * job.embedding_size if kept else 0


def _unreduced_gradient(job: PlannedJob) -> int:
    """The unembedding's gradient in a first micro-step under BF16_Optimizer, which reduces only after backward."""
    first = states.is_bf16_optimizer(job) and job.micro_steps == 1
    return _unembedding_gradient(job) if first else 0


def _buckets_beyond_rest(job: PlannedJob, written: int) -> int:
    return states.buckets_in_backward(job, written) - states.buckets_at_rest(job)


def _optimizer_step(job: PlannedJob) -> dict[str, int]:
    return {"gradients": states.gradients_in_step(job)}


_MOMENTS: dict[str, Callable[[PlannedJob], dict[str, int]]] = {
    "the loss phase": _loss_phase,
    "the start of backward": _start_of_backward,
    "the unembedding's reduction": _first_reduction,
    "a head's backward": _head_backward,
    "the end of backward": _end_of_backward,
    "the gradient's reduction": _whole_reduction,
    "the optimiser's step": _optimizer_step,
}
