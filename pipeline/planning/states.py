"""What DeepSpeed holds of a model, on the device and on the host: read in its 0.19.8 sources, which each function names.

All sizes are bytes. A master copy in float32 exists beside the weights even where those are float32 themselves: DeepSpeed
compares a device's name with a device, finds them different, and copies (`stage3.py`, _create_fp32_partitions).
"""

from pipeline.planning.case import FLOAT32, Case, parameter_sizes

ADAM_STATES = 2
_LARGEST_FLATTENED = 500_000_000
"""engine.py, MEMORY_OPT_ALLREDUCE_SIZE."""


def weights(case: Case) -> int:
    """The weights as they lie between steps: this rank's part under stage 3 (`lp_param_buffer`), else all of them
    (`bit16_groups_flat`)."""
    return case.width * (case.part if case.stage == 3 else case.whole)


def master_weights(case: Case) -> int:
    """fp32_partitioned_groups_flat, single_partition_of_fp32_groups: of this rank's part alone in every stage."""
    return FLOAT32 * case.part


def optimizer(case: Case) -> int:
    """AdamW's two moments, from the first step on."""
    return ADAM_STATES * FLOAT32 * case.part


def gradients_at_rest(case: Case) -> int:
    """Stage 3 keeps its accumulator (`grad_partitions_flat_buffer`); stage 1 in bf16 is another optimiser, whose float32
    gradients are whole on every rank (`bf16_optimizer.py`, fp32_groups_gradients_flat). Offloaded, the gradients that the
    host's optimiser reads are there a second time (the `.grad` of its partitions)."""
    accumulator = FLOAT32 * case.part if case.stage == 3 else 0
    if is_bf16_optimizer(case):
        accumulator = FLOAT32 * case.whole
    return accumulator + (FLOAT32 * case.part if case.offloads_optimizer else 0)


def buckets_at_rest(case: Case) -> int:
    """Where gradients wait to be reduced: stage 3 holds one bucket for good, in the communication's float32. Stages 1 and 2
    allocate theirs for each backward (`buckets_in_backward`)."""
    return FLOAT32 * _touched(case, case.whole) if case.stage == 3 and case.zero.contiguous_gradients else 0


def buckets_in_backward(case: Case, written: int) -> int:
    """setup_buckets of `stage_1_and_2.py`: two in turn where reduction overlaps with backward. `written`: values of the
    gradients that are there by then."""
    if case.stage == 3 or is_bf16_optimizer(case) or not case.zero.contiguous_gradients:
        return buckets_at_rest(case)
    first = _touched(case, written)
    return case.width * (first + (_touched(case, written - first) if case.zero.overlap_comm else 0))


def _touched(case: Case, written: int) -> int:
    """A bucket is memory on a GPU from the start; on a CPU only as far as gradients were ever written into it."""
    size = int(case.zero.reduce_bucket_size)
    return size if case.on_gpu else min(size, written)


def reducing(case: Case) -> int:
    """What the reduction of a bucket makes while it lasts.

    Stage 3, `reduce_scatter_coalesced`: the bucket's gradients once more, in the order of the ranks' parts. Stages 1 and 2,
    `average_tensor`, `allreduce_bucket`: the slices of each owner flattened, where there is more than one (in bf16 a rank's
    own slices are never joined), and in bf16 a float32 copy of that, which is sent.
    """
    bucket = min(int(case.zero.reduce_bucket_size), case.whole)
    if case.stage == 3:
        return FLOAT32 * bucket
    if is_bf16_optimizer(case):
        return 0
    if case.width != FLOAT32:
        return (case.width + FLOAT32) * bucket
    return FLOAT32 * bucket if case.part < bucket else 0


def reducing_alone(case: Case) -> int:
    """A gradient that fits no bucket is reduced in place, in bf16 in a float32 copy."""
    return 0 if case.width == FLOAT32 else FLOAT32 * case.unembedding


def reducing_whole(case: Case) -> int:
    """BF16_Optimizer's gradients are reduced when backward is over, by `buffered_allreduce_fallback`: a float32 tensor of all
    matrices and one of all vectors, flattened into another one, but for matrices of more than 500M values, which go alone
    and in place."""
    return FLOAT32 * case.whole if is_bf16_optimizer(case) and case.matrices <= _LARGEST_FLATTENED else 0


def fits_no_bucket(case: Case) -> bool:
    """Whether the embedding's gradients are too large for a bucket: each stays where it is until the next one comes."""
    return case.unembedding > int(case.zero.reduce_bucket_size)


def gradients_accumulated(case: Case) -> int:
    """What earlier micro-steps leave at the start of a backward, beside what is there at rest: in bf16's stage 1 the weights'
    own `.grad`, which are set to zero only in the step."""
    if case.micro_steps == 1 or case.stage == 3:
        return 0
    if is_bf16_optimizer(case):
        return case.width * case.whole
    return FLOAT32 * (case.part if case.stage == 2 else case.whole)


def gradients_in_backward(case: Case) -> int:
    """What lies there beside it from the first reduction of a backward on: the averaged part, whole from the start in bf16
    (`_build_compact_grad_partition_buffer`) and on a GPU (`grads_in_partition`), elsewhere as far as it is written."""
    at_once = case.stage != 3 and not is_bf16_optimizer(case) and (case.width != FLOAT32 or case.on_gpu)
    return max(gradients_accumulated(case), FLOAT32 * case.part if at_once else 0)


def gradients_after_backward(case: Case) -> int:
    """At the end of a backward, beside what is there at rest: the averaged part that the step will flatten in stages 1 and
    2, in bf16's stage 1 the whole gradient in bf16, the embedding's in it or added to it."""
    if is_bf16_optimizer(case):
        return case.width * case.whole
    return 0 if case.stage == 3 else max(FLOAT32 * case.part, gradients_accumulated(case))


def gradients_in_step(case: Case) -> int:
    """_prepare_fp32_grad_for_sub_group, _get_preflattened_grad_partition: the gradients once more as one flat tensor, of no
    more than sub_group_size values at a time in stage 3; in bf16's stages they are flat already. The norm of the largest is
    taken in float64 (get_norm_dtype); BF16_Optimizer still has the weights' own gradients."""
    if case.offloads_optimizer:
        return 0
    if is_bf16_optimizer(case):
        return case.width * case.whole
    if case.stage == 3:
        return FLOAT32 * min(case.part, int(case.zero.sub_group_size))
    flattened = FLOAT32 * case.part if case.width == FLOAT32 else 0
    return FLOAT32 * case.part + max(flattened, 2 * FLOAT32 * min(case.part, case.unembedding))


def is_bf16_optimizer(case: Case) -> bool:
    """engine.py, _do_optimizer_sanity_check: bf16 with float32 gradients in stage 1 goes to BF16_Optimizer."""
    return case.stage == 1 and case.width == 2 and not case.offloads_optimizer


def persistent(case: Case, sizes: list[int]) -> int:
    """Parameters so small that stage 3 never gives them back (stage3_param_persistence_threshold)."""
    return case.width * sum(size for size in sizes if size <= case.zero.param_persistence_threshold)


def gathered(case: Case) -> int:
    """The most that stage 3 holds of other ranks' weights, in a step after the second, from which on it knows the order.

    Every module that is entered fetches ahead, so that what is fetched soon fills stage3_max_live_parameters, the last block
    beyond it. And a parameter stays after its use if fewer than
    stage3_max_reuse_distance values lie between this use and the next (`__params_to_release`); between forward and
    backward of a layer all that follows it lies twice, where it is made again three times. Beyond that there is the
    module at work, and where blocks are made again a second one, whose backward asked for it. Neither grows with the number of
    heads (tests/integration/test_gathered_parameters.py). A single rank's parts are whole, and are used in place.
    """
    if case.stage != 3 or case.num_ranks == 1:
        return 0
    repeated = case.settings.training.activation_checkpointing != "none"
    ahead = int(case.zero.max_live_parameters) if case.zero.prefetch_bucket_size else 0
    kept = max(ahead, int(case.zero.max_reuse_distance) // (3 if repeated else 2))
    at_work = case.largest_module * (2 if repeated else 1)
    return max(persistent(case, case.parameters), case.width * min(case.whole, kept + at_work))


def reference(case: Case) -> int:
    """The frozen reference between its forwards: no master copy, no optimiser, no gradients. What its forward gathers goes
    back before the policy's begins."""
    if case.reference is None:
        return 0
    sizes = parameter_sizes(case.reference)
    if case.sharding == "replicate":
        return case.width * sum(sizes)
    resident = persistent(case, sizes) if case.num_ranks > 1 else 0
    return case.width * sum(-(-size // case.num_ranks) for size in sizes) + resident
