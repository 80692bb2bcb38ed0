"""The expected speed of a job: what each part of a step takes, from the FLOPs and bytes of its shapes and from stated peaks.

    a step = micro-steps × (products + memory + exposed traffic + small collectives) + optimizer + its traffic

- products: the matrix products that are executed, recomputed ones too, at the speed that large products reach. Attention runs
  at half of it, as flash attention does.
- memory: what norms, RoPE, SwiGLU, residuals, attention and the passes over logits read and write, at the speed of a copy.
- traffic (`traffic`): a block's weights are fetched while the block before it runs, gradients reduced beside the backward of
  later ones, so of each phase only the part counts that takes longer than its computation, and the first block's gather.
  Without "overlap_comm" all of it counts.
- optimizer: the bytes that AdamW and ZeRO's copies move; of an offloaded one, at a host's memory bandwidth.

Left out: data (less than 1 % of a step), launches of kernels that a small model cannot hide, stragglers and congestion.
"""

import math
from dataclasses import dataclass

from pipeline.config import ModelSettings
from pipeline.flops import block_flops, logits_flops, selective_flops
from pipeline.model.transformer import attention_head_dim, ffn_dim
from pipeline.planning import activations
from pipeline.planning.hardware import Hardware
from pipeline.planning.planned_job import FLOAT32, PlannedJob
from pipeline.planning.traffic import SMALL_COLLECTIVES, Traffic, step_traffic

BLOCK_SHARE = 0.83
"""Speed of a block's products on a GPU as a share of a large square's. On an H200 a block of D 2048 took 9.5 ms for 16k tokens
(`model.elementwise`), of which a sixth is memory passes."""
ATTENTION_SHARE = 0.5
"""Speed of flash attention as a share of a large product's: FlashAttention-2 on an H100 (arXiv 2407.08608, figure 5)."""
OPTIMIZER_BYTES = 56
"""Bytes moved for a parameter by an optimizer's step: its gradient is read for the norm, 4, copied, 8, and scaled, 8; AdamW
reads 16 and writes 12; weights are cast, 6, and copied, 2."""
GRADIENT_BYTES = 26
"""Bytes moved for a parameter by a micro-step: its gradient read and put into a bucket in float32, sorted by owner, added."""
HOST_BANDWIDTH = 25e9
"""Bytes a second and rank of host memory, for an offloaded optimizer: an eighth of 200 GB/s."""


@dataclass(frozen=True)
class Speed:
    """The time that a step is expected to take.

    parts: seconds of a step by part; their sum is the step. hidden: seconds of traffic that runs beside computation.
    useful_flops: of a token (`pipeline.flops`). tokens: of a step, over all ranks.
    """

    parts: dict[str, float]
    hidden: float
    useful_flops: float
    tokens: int
    num_ranks: int
    peak_flops: float | None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """Useful FLOPs a second and rank over the card's peak."""
        if self.peak_flops is None:
            return None
        return self.useful_flops * self.tokens_per_second / (self.num_ranks * self.peak_flops)


def plan_speed(job: PlannedJob, hardware: Hardware, keys_a_query: float | None = None) -> Speed:
    """Compute the expected speed.

    keys_a_query: tokens that a token attends to, on average; by default those of a document that fills its row.
    """
    length = job.settings.data.sequence_length
    keys = keys_a_query or (length + 1) / 2
    compute, traffic = _Compute(job, hardware, keys), step_traffic(job)

    # Each phase of a micro-step beside the traffic that it can hide.
    micro_steps, small = job.micro_steps, Traffic(SMALL_COLLECTIVES, 0.0, job.num_ranks)
    phases = [
        (micro_steps, compute.reference, [traffic.reference]),
        (1, compute.forward, [traffic.forward]),
        (micro_steps - 1, compute.forward, [traffic.later_forward]),
        (micro_steps, compute.backward, [traffic.backward, traffic.reduced]),
    ]
    taken = sum(times * _seconds(each, hardware) for times, _, called in phases for each in called)
    exposed = sum(times * _exposed(job, busy, called, hardware) for times, busy, called in phases)

    parts = {
        "products": micro_steps * compute.products,
        "memory passes": micro_steps * compute.memory,
        "exposed traffic": exposed,
        "small collectives": micro_steps * _seconds(small, hardware),
        "optimizer": _optimizer_seconds(job, hardware),
        "traffic of the update": _seconds(traffic.summed, hardware) + _seconds(traffic.updated, hardware),
    }
    return Speed(
        parts={name: seconds for name, seconds in parts.items() if seconds},
        hidden=taken - exposed,
        useful_flops=useful_flops(job, keys),
        tokens=job.settings.data.global_batch * length,
        num_ranks=job.num_ranks,
        peak_flops=hardware.peak_flops,
    )


def useful_flops(job: PlannedJob, keys_a_query: float) -> float:
    """Return the useful FLOPs of a token, with the planned reference."""
    model = job.settings.model
    return selective_flops(model, keys_a_query, model.num_prediction_heads, _k_percent(job), job.reference)


def _k_percent(job: PlannedJob) -> float:
    """The share that is selected, at the end of its schedule."""
    k_percent = job.settings.training.k_percent
    return k_percent[-1][1] if isinstance(k_percent, list) else k_percent


class _Compute:
    """Seconds of a micro-step's phases, and of all of them by what bounds them."""

    def __init__(self, job: PlannedJob, hardware: Hardware, keys_a_query: float):
        model, tokens = job.settings.model, job.num_tokens
        blocks = model.num_layers - 1 + model.num_prediction_heads
        self._hardware = hardware
        self.products = self.memory = 0.0

        # The reference's forward, the policy's, its loss phase, and backward: two products for each of forward's.
        again = 1 if job.settings.training.activation_checkpointing == "full" else 0
        reads = _block_values(job, model)
        self.reference = 0.0 if job.reference is None else self._forward(job, job.reference, keys_a_query)
        block = _block_seconds(job, model, keys_a_query, hardware)
        self.forward = self._add(tokens * blocks * block, tokens * blocks * reads[0] * job.dtype_bytes)
        self.forward += self._loss_phase(job)
        moved = tokens * blocks * (reads[1] + again * reads[0]) * job.dtype_bytes + GRADIENT_BYTES * job.num_parameters
        self.backward = self._add((2 + again) * tokens * blocks * block, moved)

    def _add(self, products: float, moved: float) -> float:
        """Account for seconds of products and bytes that are moved; returns the seconds of both."""
        self.products += products
        self.memory += moved / self._hardware.memory_bandwidth
        return products + moved / self._hardware.memory_bandwidth

    def _forward(self, job: PlannedJob, shape: ModelSettings, keys_a_query: float) -> float:
        heads, tokens = shape.num_prediction_heads, job.num_tokens
        blocks = shape.num_layers - 1 + heads
        logits = tokens * heads * logits_flops(shape) / self._hardware.step_flops
        scored = tokens * heads * job.vocab_size * _SCORED_BYTES
        block = tokens * blocks * _block_seconds(job, shape, keys_a_query, self._hardware)
        return self._add(logits + block, scored + tokens * blocks * _block_values(job, shape)[0] * job.dtype_bytes)

    def _loss_phase(self, job: PlannedJob) -> float:
        """Scores for all pairs; gradients for those of head 0 and the selected ones of the others."""
        model, training = job.settings.model, job.settings.training
        others = model.num_prediction_heads - 1
        selected = _k_percent(job) * others
        scored, taken = 1.0 + others, 1.0 + selected
        if training.loss_phase == "two_pass":
            scored += selected
        if training.loss_phase == "dense":
            taken = scored
        products = job.num_tokens * (scored + 2 * taken) * logits_flops(model) / self._hardware.step_flops
        bytes_taken = _TAKEN_BYTES if job.dtype_bytes == FLOAT32 else _TAKEN_BYTES + 3 * job.dtype_bytes
        return self._add(products, job.num_tokens * job.vocab_size * (scored * _SCORED_BYTES + taken * bytes_taken))


_SCORED_BYTES = 4 * FLOAT32
"""Bytes moved for a logit: written, then log-softmax reads it twice and writes it."""
_TAKEN_BYTES = 2 * FLOAT32
"""Bytes moved for a logit's gradient: exponentiated; in bf16 it is written and read by two products in bf16 besides."""


def _block_seconds(job: PlannedJob, shape: ModelSettings, keys_a_query: float, hardware: Hardware) -> float:
    """Seconds of a block's products in forward, a token."""
    weights = block_flops(shape, 0.0)
    attention = block_flops(shape, keys_a_query) - weights
    share = BLOCK_SHARE if job.on_gpu else 1.0
    return (weights / share + attention / ATTENTION_SHARE) / hardware.step_flops


def _block_values(job: PlannedJob, shape: ModelSettings) -> tuple[float, float]:
    """Values that a block's elementwise work and attention move, a token: (in forward, in backward).

    Forward of one kernel each: two norms 4 D, two residual sums 6 D, RoPE 2 of queries and keys, SwiGLU 3 F, attention's inputs
    and output. Backward: two norms 6 D, two sums 6 D, RoPE 2, SwiGLU 5 F, attention's twice and its output's. Eagerly RoPE
    casts, negates, joins, multiplies and adds one after the other, in float32, SwiGLU keeps silu apart; a CPU composes a norm.
    """
    query = shape.num_attention_heads * attention_head_dim(shape)
    key = (shape.num_key_value_heads or shape.num_attention_heads) * attention_head_dim(shape)
    rotated, wide, attended = query + key, ffn_dim(shape), 2 * (query + key)
    compiled = activations.compiles(job.settings.training.compile, job.settings.training.activation_checkpointing, _device(job))
    rotations = 2 if compiled else 10 * FLOAT32 / job.dtype_bytes
    gate, gate_backward = (3, 5) if compiled else (5, 8)
    norms, norms_backward = (4, 6) if job.on_gpu else (14, 24)
    forward = (norms + 6) * shape.dim + rotations * rotated + gate * wide + attended
    return forward, (norms_backward + 6) * shape.dim + rotations * rotated + gate_backward * wide + 2 * attended + query


def _device(job: PlannedJob) -> str:
    return "cuda" if job.on_gpu else "cpu"


def _seconds(called: Traffic, hardware: Hardware) -> float:
    """Seconds of collectives: each a message to as many ranks in turn as doublings make all, then the bytes."""
    if called.ranks == 1:
        return 0.0
    latency = called.calls * math.ceil(math.log2(called.ranks)) * hardware.latency
    return latency + called.sent / hardware.bandwidth(called.ranks)


def _exposed(job: PlannedJob, busy: float, called: list[Traffic], hardware: Hardware) -> float:
    """Seconds of a phase's traffic that its computation does not hide."""
    taken = sum(_seconds(each, hardware) for each in called)
    if not job.zero.overlap_comm:
        return taken
    first = sum(_seconds(each, hardware) / each.calls for each in called[:1] if each.calls)
    return max(first, taken - busy)


def _optimizer_seconds(job: PlannedJob, hardware: Hardware) -> float:
    bandwidth = HOST_BANDWIDTH if job.offloads_optimizer else hardware.memory_bandwidth
    return OPTIMIZER_BYTES * job.num_local_parameters / bandwidth
