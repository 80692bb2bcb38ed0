"""What DeepSpeed holds of a model, on the device and on the host: read in its 0.19.8 sources, which each function names.

All sizes are bytes. A master copy in float32 exists beside the weights even where those are float32 themselves: DeepSpeed
compares a device's name with a device, finds them different, and copies (`stage3.py`, _create_fp32_partitions).
"""

from pipeline.planning.planned_job import FLOAT32, PlannedJob, parameter_sizes

ADAM_STATES = 2
_LARGEST_FLATTENED = 500_000_000
"""engine.py, MEMORY_OPT_ALLREDUCE_SIZE."""


def weights(job: PlannedJob) -> int:
    """The weights as they lie between steps: this rank's part under stage 3 (`lp_param_buffer`), else all of them
    (`bit16_groups_flat`)."""
    return job.dtype_bytes * (job.num_local_parameters if job.stage == 3 else job.num_parameters)


def master_weights(job: PlannedJob) -> int:
    """fp32_partitioned_groups_flat, single_partition_of_fp32_groups: of this rank's part alone in every stage."""
    return FLOAT32 * job.num_local_parameters


def optimizer(job: PlannedJob) -> int:
    """AdamW's two moments, from the first step on."""
    return ADAM_STATES * FLOAT32 * job.num_local_parameters


def gradients_at_rest(job: PlannedJob) -> int:
    """Stage 3 keeps its accumulator (`grad_partitions_flat_buffer`); stage 1 in bf16 is another optimiser, whose float32
    gradients are whole on every rank (`bf16_optimizer.py`, fp32_groups_gradients_flat). Offloaded, the gradients that the
    host's optimiser reads are there a second time (the `.grad` of its partitions)."""
    accumulator = FLOAT32 * job.num_local_parameters if job.stage == 3 else 0
    if is_bf16_optimizer(job):
        accumulator = FLOAT32 * job.num_parameters
    return accumulator + (FLOAT32 * job.num_local_parameters if job.offloads_optimizer else 0)


def buckets_at_rest(job: PlannedJob) -> int:
    """Where gradients wait to be reduced: stage 3 holds one bucket for good, in the communication's float32. Stages 1 and 2
    allocate theirs for each backward (`buckets_in_backward`)."""
    return FLOAT32 * _bucket_values(job, job.num_parameters) if job.stage == 3 and job.zero.contiguous_gradients else 0


def buckets_in_backward(job: PlannedJob, written: int) -> int:
    """setup_buckets of `stage_1_and_2.py`: two in turn where reduction overlaps with backward. `written`: values of the
    gradients that are there by then."""
    if job.stage == 3 or is_bf16_optimizer(job) or not job.zero.contiguous_gradients:
        return buckets_at_rest(job)
    first = _bucket_values(job, written)
    return job.dtype_bytes * (first + (_bucket_values(job, written - first) if job.zero.overlap_comm else 0))


def _bucket_values(job: PlannedJob, written: int) -> int:
    """A bucket is memory on a GPU from the start; on a CPU only as far as gradients were ever written into it."""
    size = int(job.zero.reduce_bucket_size)
    return size if job.on_gpu else min(size, written)


def reduction_buffers(job: PlannedJob) -> int:
    """What the reduction of a bucket makes while it lasts.

    Stage 3, `reduce_scatter_coalesced`: the bucket's gradients once more, in the order of the ranks' parts. Stages 1 and 2,
    `average_tensor`, `allreduce_bucket`: the slices of each owner flattened, where there is more than one (in bf16 a rank's
    own slices are never joined), and in bf16 a float32 copy of that, which is sent.
    """
    bucket = min(int(job.zero.reduce_bucket_size), job.num_parameters)
    if job.stage == 3:
        return FLOAT32 * bucket
    if is_bf16_optimizer(job):
        return 0
    if job.dtype_bytes != FLOAT32:
        return (job.dtype_bytes + FLOAT32) * bucket
    return FLOAT32 * bucket if job.num_local_parameters < bucket else 0


def unbucketed_reduction(job: PlannedJob) -> int:
    """A gradient that fits no bucket is reduced in place, in bf16 in a float32 copy."""
    return 0 if job.dtype_bytes == FLOAT32 else FLOAT32 * job.embedding_size


def bf16_optimizer_reduction(job: PlannedJob) -> int:
    """BF16_Optimizer's gradients are reduced when backward is over, by `buffered_allreduce_fallback`: a float32 tensor of all
    matrices and one of all vectors, flattened into another one, but for matrices of more than 500M values, which go alone
    and in place."""
    return FLOAT32 * job.num_parameters if is_bf16_optimizer(job) and job.num_matrix_parameters <= _LARGEST_FLATTENED else 0


def exceeds_bucket(job: PlannedJob) -> bool:
    """Whether the embedding's gradients are too large for a bucket: each stays where it is until the next one comes."""
    return job.embedding_size > int(job.zero.reduce_bucket_size)


def gradients_accumulated(job: PlannedJob) -> int:
    """What earlier micro-steps leave at the start of a backward, beside what is there at rest: in bf16's stage 1 the weights'
    own `.grad`, which are set to zero only in the step."""
    if job.micro_steps == 1 or job.stage == 3:
        return 0
    if is_bf16_optimizer(job):
        return job.dtype_bytes * job.num_parameters
    return FLOAT32 * (job.num_local_parameters if job.stage == 2 else job.num_parameters)


def gradients_in_backward(job: PlannedJob) -> int:
    """What lies there beside it from the first reduction of a backward on: the averaged part, whole from the start in bf16
    (`_build_compact_grad_partition_buffer`) and on a GPU (`grads_in_partition`), elsewhere as far as it is written."""
    at_once = job.stage != 3 and not is_bf16_optimizer(job) and (job.dtype_bytes != FLOAT32 or job.on_gpu)
    return max(gradients_accumulated(job), FLOAT32 * job.num_local_parameters if at_once else 0)


def gradients_after_backward(job: PlannedJob) -> int:
    """At the end of a backward, beside what is there at rest: the averaged part that the step will flatten in stages 1 and
    2, in bf16's stage 1 the whole gradient in bf16, the embedding's in it or added to it."""
    if is_bf16_optimizer(job):
        return job.dtype_bytes * job.num_parameters
    return 0 if job.stage == 3 else max(FLOAT32 * job.num_local_parameters, gradients_accumulated(job))


def gradients_in_step(job: PlannedJob) -> int:
    """_prepare_fp32_grad_for_sub_group, _get_preflattened_grad_partition: the gradients once more as one flat tensor, of no
    more than sub_group_size values at a time in stage 3; in bf16's stages they are flat already. The norm of the largest is
    taken in float64 (get_norm_dtype); BF16_Optimizer still has the weights' own gradients."""
    if job.offloads_optimizer:
        return 0
    if is_bf16_optimizer(job):
        return job.dtype_bytes * job.num_parameters
    if job.stage == 3:
        return FLOAT32 * min(job.num_local_parameters, int(job.zero.sub_group_size))
    flattened = FLOAT32 * job.num_local_parameters if job.dtype_bytes == FLOAT32 else 0
    return FLOAT32 * job.num_local_parameters + max(flattened, 2 * FLOAT32 * min(job.num_local_parameters, job.embedding_size))


def is_bf16_optimizer(job: PlannedJob) -> bool:
    """engine.py, _do_optimizer_sanity_check: bf16 with float32 gradients in stage 1 goes to BF16_Optimizer."""
    return job.stage == 1 and job.dtype_bytes == 2 and not job.offloads_optimizer


def persistent_parameters(job: PlannedJob, sizes: list[int]) -> int:
    """Parameters so small that stage 3 never gives them back (stage3_param_persistence_threshold)."""
    return job.dtype_bytes * sum(size for size in sizes if size <= job.zero.param_persistence_threshold)


def gathered_parameters(job: PlannedJob) -> int:
    """The most that stage 3 holds of other ranks' weights, in a step after the second, from which on it knows the order.

    Every module that is entered fetches ahead, so that what is fetched soon fills stage3_max_live_parameters, the last block
    beyond it. And a parameter stays after its use if fewer than
    stage3_max_reuse_distance values lie between this use and the next (`__params_to_release`); between forward and
    backward of a layer all that follows it lies twice, where it is made again three times. Beyond that there is the
    module at work, and where blocks are made again a second one, whose backward asked for it. Neither grows with the number of
    heads (tests/integration/test_gathered_parameters.py). A single rank's parts are whole, and are used in place.
    """
    if job.stage != 3 or job.num_ranks == 1:
        return 0
    repeated = job.settings.training.activation_checkpointing != "none"
    ahead = int(job.zero.max_live_parameters) if job.zero.prefetch_bucket_size else 0
    kept = max(ahead, int(job.zero.max_reuse_distance) // (3 if repeated else 2))
    at_work = job.largest_gathered_module * (2 if repeated else 1)
    return max(persistent_parameters(job, job.parameter_sizes), job.dtype_bytes * min(job.num_parameters, kept + at_work))


def reference(job: PlannedJob) -> int:
    """The frozen reference between its forwards: no master copy, no optimiser, no gradients. What its forward gathers goes
    back before the policy's begins."""
    if job.reference is None:
        return 0
    sizes = parameter_sizes(job.reference)
    if job.sharding == "replicate":
        return job.dtype_bytes * sum(sizes)
    resident = persistent_parameters(job, sizes) if job.num_ranks > 1 else 0
    return job.dtype_bytes * sum(-(-size // job.num_ranks) for size in sizes) + resident
