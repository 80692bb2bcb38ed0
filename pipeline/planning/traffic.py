"""The collectives of a job's step, from shapes: what `launch/benchmark.py traffic` counts, for any number of ranks.

Under ZeRO-3 a block of the policy is gathered for forward and again for backward, unless it is still there; a sharded
reference's once. As many values stay from forward to backward as `stage3_max_live_parameters` and `stage3_max_reuse_distance`
allow. The embedding and the unembedding are not gathered for backward: the one's needs no weights, the other's was computed in
forward. With hpZ (`zero_hpz_partition_size`) a node keeps what a step's first forward has gathered until the weights change,
and the reference for good; the rest is gathered within the node. Gradients are reduced in float32 in each micro-step. Tests
hold counts and bytes to those that were recorded.
"""

import math
from typing import NamedTuple

from pipeline.config import ModelSettings
from pipeline.planning.planned_job import FLOAT32, PlannedJob, parameter_sizes
from pipeline.runtime.parameters import gathered_block_size

SMALL_COLLECTIVES = 8
"""Collectives of a step beside weights and gradients, a few bytes each: the exchange's, counts, the gradient's norm."""


class Traffic(NamedTuple):
    """Collectives of one kind and moment.

    calls: number. whole: bytes of the gathered tensors, or of the tensors that are summed. ranks: over which.
    """

    calls: int
    whole: float
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, by the least that any algorithm does."""
        return self.whole * (self.ranks - 1) / self.ranks


class StepTraffic(NamedTuple):
    """The collectives of a micro-step, by the phase that they can run beside, and those of a step.

    later_forward: in forward of a step's micro-steps but the first. updated: the weights gathered after the optimizer's step;
    summed: the gradients reduced with it.
    """

    reference: Traffic
    forward: Traffic
    later_forward: Traffic
    backward: Traffic
    reduced: Traffic
    summed: Traffic
    updated: Traffic


def step_traffic(job: PlannedJob) -> StepTraffic:
    """Compute the collectives of a step."""
    none = Traffic(0, 0.0, job.num_ranks)
    reference = none
    if job.reference is not None and job.sharding == "zero3":
        reference = _gathered(job, job.reference)._replace(ranks=_ranks_with_copies(job))
    buckets = -(-job.num_parameters // int(job.zero.reduce_bucket_size))
    reduced = Traffic(buckets, FLOAT32 * job.num_parameters, job.num_ranks)

    if job.stage == 3:
        vectors = [size for size in job.parameter_sizes if size <= job.zero.param_persistence_threshold]
        resident = Traffic(len(vectors), job.dtype_bytes * sum(vectors), job.num_ranks)
        forward = _gathered(job, job.settings.model)
        later = forward._replace(ranks=_ranks_with_copies(job))
        return StepTraffic(reference, forward, later, _gathered_again(job, forward), reduced, none, resident)

    weights = Traffic(buckets, job.dtype_bytes * job.num_parameters, job.num_ranks)
    if job.stage == 2:
        return StepTraffic(reference, none, none, none, reduced, none, weights)
    # Stage 1 sums whole gradients, once a step: twice the bytes.
    return StepTraffic(reference, none, none, none, none, reduced._replace(whole=2 * reduced.whole), weights)


def _gathered(job: PlannedJob, shape: ModelSettings) -> Traffic:
    """The gathers of a model's forward: one a block and embedding. What is below the persistence threshold stays gathered."""
    threshold = job.zero.param_persistence_threshold
    values = sum(size for size in parameter_sizes(shape) if size > threshold)
    embeddings = _embeddings(shape, threshold)
    calls = _num_blocks(values - sum(embeddings), shape, threshold) + len(embeddings)
    return Traffic(calls, job.dtype_bytes * values, job.num_ranks)


def _gathered_again(job: PlannedJob, forward: Traffic) -> Traffic:
    """The gathers of the policy's backward."""
    shape, threshold = job.settings.model, job.zero.param_persistence_threshold
    values = forward.whole / job.dtype_bytes - sum(_embeddings(shape, threshold))
    again = max(0.0, values - min(int(job.zero.max_live_parameters), int(job.zero.max_reuse_distance)))
    return Traffic(_num_blocks(again, shape, threshold), job.dtype_bytes * again, _ranks_with_copies(job))


def _ranks_with_copies(job: PlannedJob) -> int:
    """The ranks among which a copy of the weights is partitioned: all of them, or those of a node with hpZ."""
    of_node = int(job.zero.zero_hpz_partition_size)
    return min(of_node, job.num_ranks) if of_node > 1 else job.num_ranks


def _num_blocks(values: float, shape: ModelSettings, threshold: float) -> int:
    return math.ceil(values / gathered_block_size(shape, threshold)) if values else 0


def _embeddings(shape: ModelSettings, threshold: float) -> list[int]:
    """Sizes of the embedding and, if it is another, the unembedding, as far as they are gathered."""
    assert shape.vocab_size is not None
    size = shape.vocab_size * shape.dim
    return [size] * (0 if size <= threshold else 1 if shape.tied_embeddings else 2)
