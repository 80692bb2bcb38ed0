"""Memory that DeepSpeed holds for a model: weights, master weights, optimizer states, gradients, buckets.

Read in the sources of DeepSpeed 0.19.8; each function names the buffer or function it models. All sizes are bytes.

A float32 master copy exists beside the weights even if these are float32 themselves: DeepSpeed compares the name of a device
with a device object, finds them different, and copies (`stage3.py`, _create_fp32_partitions).
"""

from pipeline.planning.planned_job import FLOAT32, PlannedJob, parameter_sizes

ADAM_STATES = 2
_LARGEST_FLATTENED = 500_000_000
"""Values up to which BF16_Optimizer flattens gradients to reduce them (`engine.py`, MEMORY_OPT_ALLREDUCE_SIZE)."""


def weights(job: PlannedJob) -> int:
    """Weights between steps: this rank's partition in stage 3 (`lp_param_buffer`), else all (`bit16_groups_flat`)."""
    return job.dtype_bytes * (job.num_local_parameters if job.stage == 3 else job.num_parameters)


def master_weights(job: PlannedJob) -> int:
    """Float32 master weights of this rank's partition, in every stage.

    Stage 3: `fp32_partitioned_groups_flat`; stages 1 and 2: `single_partition_of_fp32_groups`.
    """
    return FLOAT32 * job.num_local_parameters


def optimizer(job: PlannedJob) -> int:
    """AdamW's two moments, which exist from the first step on."""
    return ADAM_STATES * FLOAT32 * job.num_local_parameters


def checkpoint_copies(job: PlannedJob) -> int:
    """Host copies of this rank's master weights and moments, which a save in the background writes."""
    return master_weights(job) + optimizer(job)


def gradients_at_rest(job: PlannedJob) -> int:
    """Gradient buffers that exist between steps.

    Stage 3 keeps its accumulator (`grad_partitions_flat_buffer`). Stage 1 in bf16 runs another optimizer, whose float32
    gradients are whole on every rank (`bf16_optimizer.py`, fp32_groups_gradients_flat). With an offloaded optimizer the host
    has a second copy, the `.grad` of its partitions.
    """
    accumulator = FLOAT32 * job.num_local_parameters if job.stage == 3 else 0
    if is_bf16_optimizer(job):
        accumulator = FLOAT32 * job.num_parameters
    return accumulator + (FLOAT32 * job.num_local_parameters if job.offloads_optimizer else 0)


def buckets_at_rest(job: PlannedJob) -> int:
    """Reduce buckets that exist between steps: stage 3 keeps one, in the communication dtype, float32.

    Stages 1 and 2 allocate theirs in each backward (`buckets_in_backward`).
    """
    return FLOAT32 * _bucket_values(job, job.num_parameters) if job.stage == 3 and job.zero.contiguous_gradients else 0


def buckets_in_backward(job: PlannedJob, written: int) -> int:
    """Reduce buckets during backward (`stage_1_and_2.py`, setup_buckets): two, in turn, with overlap_comm.

    written: number of gradient values computed so far.
    """
    if job.stage == 3 or is_bf16_optimizer(job) or not job.zero.contiguous_gradients:
        return buckets_at_rest(job)
    first = _bucket_values(job, written)
    return job.dtype_bytes * (first + (_bucket_values(job, written - first) if job.zero.overlap_comm else 0))


def _bucket_values(job: PlannedJob, written: int) -> int:
    """Values of a bucket that take memory: all on a GPU; on a CPU only the pages that were ever written."""
    size = int(job.zero.reduce_bucket_size)
    return size if job.on_gpu else min(size, written)


def reduction_buffers(job: PlannedJob) -> int:
    """Temporary buffers of one bucket's reduction.

    Stage 3 (`reduce_scatter_coalesced`): a copy of the bucket, in the order of the ranks' partitions. Stages 1 and 2
    (`average_tensor`, `allreduce_bucket`): each owner's slices flattened, if there is more than one owner (in bf16 a rank's own
    slices are never joined), and in bf16 a float32 copy, which is sent.
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
    """Temporary buffer to reduce a gradient that exceeds a bucket: none in float32 (in place), a float32 copy in bf16."""
    return 0 if job.dtype_bytes == FLOAT32 else FLOAT32 * job.embedding_size


def bf16_optimizer_reduction(job: PlannedJob) -> int:
    """Temporary buffer of BF16_Optimizer's reduction after backward (`buffered_allreduce_fallback`).

    It flattens the float32 gradients of all matrices and all vectors into one tensor; matrices of more than 500M values in all
    are reduced in place.
    """
    return FLOAT32 * job.num_parameters if is_bf16_optimizer(job) and job.num_matrix_parameters <= _LARGEST_FLATTENED else 0


def exceeds_bucket(job: PlannedJob) -> bool:
    """True if the embedding's gradient is larger than a bucket; it then stays in place until the next gradient comes."""
    return job.embedding_size > int(job.zero.reduce_bucket_size)


def gradients_accumulated(job: PlannedJob) -> int:
    """Gradients of earlier micro-steps at the start of a backward, beside `gradients_at_rest`.

    In stage 1 with bf16 these are the weights' own `.grad`, which are zeroed only in the optimizer's step.
    """
    if job.micro_steps == 1 or job.stage == 3:
        return 0
    if is_bf16_optimizer(job):
        return job.dtype_bytes * job.num_parameters
    return FLOAT32 * (job.num_local_parameters if job.stage == 2 else job.num_parameters)


def gradients_in_backward(job: PlannedJob) -> int:
    """Gradients from the first reduction of a backward on, beside `gradients_at_rest`: the averaged partition.

    It is allocated whole in bf16 (`_build_compact_grad_partition_buffer`) and on a GPU (`grads_in_partition`); in float32 on a
    CPU it takes memory as it is written.
    """
    at_once = job.stage != 3 and not is_bf16_optimizer(job) and (job.dtype_bytes != FLOAT32 or job.on_gpu)
    return max(gradients_accumulated(job), FLOAT32 * job.num_local_parameters if at_once else 0)


def gradients_after_backward(job: PlannedJob) -> int:
    """Gradients at the end of a backward, beside `gradients_at_rest`.

    Stages 1 and 2: the averaged partition, which the step will flatten. Stage 1 with bf16: the whole gradient in bf16, the
    embedding's included.
    """
    if is_bf16_optimizer(job):
        return job.dtype_bytes * job.num_parameters
    return 0 if job.stage == 3 else max(FLOAT32 * job.num_local_parameters, gradients_accumulated(job))


def gradients_in_step(job: PlannedJob) -> int:
    """Gradients in the optimizer's step, beside `gradients_at_rest`.

    They are copied into one flat tensor (`_prepare_fp32_grad_for_sub_group`, `_get_preflattened_grad_partition`), in stage 3 at
    most sub_group_size values at a time; in bf16 they are flat already. The norm of the largest is taken in float64
    (get_norm_dtype). BF16_Optimizer still has the weights' own gradients.
    """
    if job.offloads_optimizer:
        return 0
    if is_bf16_optimizer(job):
        return job.dtype_bytes * job.num_parameters
    if job.stage == 3:
        return FLOAT32 * min(job.num_local_parameters, int(job.zero.sub_group_size))
    flattened = FLOAT32 * job.num_local_parameters if job.dtype_bytes == FLOAT32 else 0
    return FLOAT32 * job.num_local_parameters + max(flattened, 2 * FLOAT32 * min(job.num_local_parameters, job.embedding_size))


def is_bf16_optimizer(job: PlannedJob) -> bool:
    """True if DeepSpeed picks BF16_Optimizer: stage 1, bf16, float32 gradients (`engine.py`, _do_optimizer_sanity_check)."""
    return job.stage == 1 and job.dtype_bytes == 2 and not job.offloads_optimizer


def persistent_parameters(job: PlannedJob, sizes: list[int]) -> int:
    """Parameters so small that stage 3 keeps them gathered (stage3_param_persistence_threshold)."""
    return job.dtype_bytes * sum(size for size in sizes if size <= job.zero.param_persistence_threshold)


def node_partition(job: PlannedJob, sizes: list[int]) -> int:
    """The second partition of a model's weights, over the ranks of a node alone, from which backward and a reference gather.

    zero_hpz_partition_size (arXiv 2306.10209); it exists from the first forward on.
    """
    ranks = int(job.zero.zero_hpz_partition_size)
    if job.stage != 3 or not 1 < ranks <= job.num_ranks:
        return 0
    return job.dtype_bytes * sum(-(-size // ranks) for size in sizes)


def gathered_parameters(job: PlannedJob) -> int:
    """Gathered weights that stage 3 holds at most, from the third step on, when it knows the order of modules.

    Two limits decide. The prefetcher runs ahead at every module until stage3_max_live_parameters is full, the last block
    beyond it. And a parameter stays gathered if fewer than stage3_max_reuse_distance values are used before its next use
    (`__params_to_release`): between a layer's forward and its backward every later layer is used twice, three times if it is
    recomputed. Beyond these there is the module that is running, and with recomputation a second one, whose backward called it.

    This does not grow with the number of heads (tests/integration/test_gathered_parameters.py). On a single rank partitions are
    whole and used in place.
    """
    if job.stage != 3 or job.num_ranks == 1:
        return 0
    repeated = job.settings.training.activation_checkpointing != "none"
    ahead = int(job.zero.max_live_parameters) if job.zero.prefetch_bucket_size else 0
    kept = max(ahead, int(job.zero.max_reuse_distance) // (3 if repeated else 2))
    at_work = job.largest_gathered_module * (2 if repeated else 1)
    return max(persistent_parameters(job, job.parameter_sizes), job.dtype_bytes * min(job.num_parameters, kept + at_work))


def reference(job: PlannedJob) -> int:
    """The frozen reference between its forwards: weights only, no master copy, optimizer or gradients.

    What its forward gathers is released before the policy's forward begins.
    """
    if job.reference is None:
        return 0
    sizes = parameter_sizes(job.reference)
    if job.sharding == "replicate":
        return job.dtype_bytes * sum(sizes)
    resident = persistent_parameters(job, sizes) if job.num_ranks > 1 else 0
    return job.dtype_bytes * sum(-(-size // job.num_ranks) for size in sizes) + resident + node_partition(job, sizes)
