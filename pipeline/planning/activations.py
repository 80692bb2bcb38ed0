"""Memory of activations: what forward and the losses save for backward, and what backward allocates while it runs.

The operations of `model.transformer`, `model.mtp` and `weighting` are counted tensor by tensor, as autograd saves them. A
change in that code needs a change here; unit tests compare these sizes with what autograd saves.

Devices differ. On a GPU RMSNorm is one kernel that saves its input; on a CPU torch composes it of operations that save float32
intermediates. On a CPU attention uses a mask, which each block converts from bool to numbers.

All functions return bytes unless they say otherwise.

Shapes: N tokens of a micro-batch, D width, F width of the feed-forward layer, V vocabulary, H heads.
"""

from pipeline.model import transformer
from pipeline.model.elementwise import compiles
from pipeline.model.transformer import attention_head_dim, ffn_dim
from pipeline.planning.planned_job import FLOAT32, PlannedJob
from pipeline.weighting.cross_entropy import MOVES, rows_per_chunk


def block_input(job: PlannedJob) -> int:
    """[N, D], the residual stream that enters a block; all heads share one."""
    return job.num_tokens * job.settings.model.dim * job.dtype_bytes


def saved_by_block(job: PlannedJob) -> int:
    """Tensors that one block saves beside its input, without checkpointing."""
    model = job.settings.model
    query, key = _projections(job)

    # Values per token. Feed-forward: gate, silu(gate), up, and the input of down; the compiled product recomputes silu(gate).
    feed_forward = (3 if _compiles(job) else 4) * ffn_dim(model)
    attended = query if _repeats_heads(job) else key
    # Query, attention's output, key, value, and both norms' outputs.
    values = 2 * query + 2 * attended + 2 * model.dim + feed_forward

    # The norms' inputs: the residual stream between attention and feed-forward; the block's input is counted elsewhere.
    into_norms, norms = model.dim, 2 * _saved_by_norm(job, model.dim)
    if model.qk_norm:
        # Their outputs are not saved: RoPE's backward needs the angles only.
        into_norms += query + key
        norms += _saved_by_norm(job, query, model.num_attention_heads) + _saved_by_norm(job, key, _key_value_heads(job))
    if not _norm_casts(job):
        values += into_norms

    mask = 0 if job.on_gpu else job.settings.data.sequence_length * job.dtype_bytes
    return job.num_tokens * (values * job.dtype_bytes + norms + mask + _log_sum_exp(job))


def saved_by_checkpointed_block(job: PlannedJob) -> int:
    """Tensors that one block saves beside its input, under `training.activation_checkpointing`."""
    model = job.settings.model
    query, key = _projections(job)
    if job.settings.training.activation_checkpointing == "none":
        return saved_by_block(job)
    if job.settings.training.activation_checkpointing == "full":
        return 0
    # The outputs of seven matrix products and of attention (`recompute.SAVED_OPERATIONS`), whether backward needs them or not.
    values = 2 * query + 2 * key + 2 * model.dim + 2 * ffn_dim(model)
    return job.num_tokens * (values * job.dtype_bytes + _log_sum_exp(job))


def recomputed(job: PlannedJob) -> int:
    """Tensors that a checkpointed block's second forward adds while its backward runs.

    These are all that the block saves without checkpointing, less what was saved anyway: the values, attention's output, and
    the feed-forward layer's gate and up.
    """
    if job.settings.training.activation_checkpointing == "none":
        return 0
    if job.settings.training.activation_checkpointing == "full":
        return saved_by_block(job)
    query, key = _projections(job)
    kept_value = 0 if _repeats_heads(job) else key  # The copies per query head are recomputed.
    kept = (query + kept_value + 2 * ffn_dim(job.settings.model)) * job.dtype_bytes + _log_sum_exp(job)
    return saved_by_block(job) - job.num_tokens * kept


def saved_for_backward(job: PlannedJob) -> int:
    """All blocks' saved tensors at the end of forward, and the batch itself."""
    model = job.settings.model
    blocks = model.num_layers - 1 + model.num_prediction_heads
    return blocks * saved_by_checkpointed_block(job) + model.num_layers * block_input(job) + _batch(job)


def head_outputs(job: PlannedJob) -> int:
    """[N, H, D], the stacked outputs of all heads."""
    return block_input(job) * job.settings.model.num_prediction_heads


def final_norm(job: PlannedJob) -> int:
    """The final norm's output and what it saves."""
    model = job.settings.model
    return head_outputs(job) + job.num_tokens * model.num_prediction_heads * _saved_by_norm(job, model.dim)


def loss_phase(job: PlannedJob) -> int:
    """Memory of the loss phase (`weighting.loss_phase`) beside the hidden states."""
    model = job.settings.model
    if job.settings.training.loss_phase == "dense":
        # cross_entropy saves each head's log-probabilities; the last head's logits still exist as well.
        logits = job.num_tokens * job.vocab_size
        return (model.num_prediction_heads + 1) * logits * FLOAT32 + _dense_loss_casts(job)

    # One chunk of logits at a time, and the part of it that is moved at once.
    device_type = "cuda" if job.on_gpu else "cpu"
    rows = rows_per_chunk(job.num_tokens, job.vocab_size, device_type)
    chunk = rows * job.vocab_size

    # In bf16 a chunk's logit gradients are cast, and its part of the weight's gradient is a bf16 tensor before it is added.
    casting = 0 if job.dtype_bytes == FLOAT32 else (chunk + job.embedding_size) * job.dtype_bytes
    if casting and not job.on_gpu:
        casting += job.embedding_size * FLOAT32  # On a CPU torch casts a copy to add tensors of two dtypes.
    rows_at_work = 2 * rows * model.dim * job.dtype_bytes
    return loss_gradients(job) + chunk * FLOAT32 + chunk * FLOAT32 // MOVES[device_type] + casting + rows_at_work


def loss_gradients(job: PlannedJob) -> int:
    """Gradients that the loss phase computes in forward: the hidden states', and the unembedding's in float32.

    `dense` computes them in backward instead.
    """
    return head_outputs(job) + job.embedding_size * FLOAT32


def norm_backward(job: PlannedJob) -> int:
    """Memory that the final norm's backward adds: gradients of its output and input; on a CPU four float32 intermediates."""
    hidden = head_outputs(job)
    return 2 * hidden if job.on_gpu else 4 * hidden * FLOAT32 // job.dtype_bytes


def dense_loss_backward(job: PlannedJob) -> int:
    """Memory of the dense oracle's backward: a head's logit gradients, and the unembedding's gradient twice."""
    logits = job.num_tokens * job.vocab_size
    saved = job.settings.model.num_prediction_heads * logits * FLOAT32 + _dense_loss_casts(job)
    return saved + logits * FLOAT32 + 2 * job.embedding_size * FLOAT32 + head_outputs(job)


def _dense_loss_casts(job: PlannedJob) -> int:
    """Float32 copies of both factors, which the dense oracle's products save when the model runs in bf16."""
    if job.dtype_bytes == FLOAT32:
        return 0
    return head_outputs(job) * FLOAT32 // job.dtype_bytes + job.embedding_size * FLOAT32


def block_backward(job: PlannedJob) -> int:
    """Memory that one block's backward adds: recomputed tensors, gradients of the stream and of two feed-forward tensors."""
    wide = 2 * job.num_tokens * ffn_dim(job.settings.model) * job.dtype_bytes
    return recomputed(job) + head_outputs(job) + 2 * block_input(job) + detached_gradient(job) + wide


def detached_gradient(job: PlannedJob) -> int:
    """The gradient at the heads' copy of the trunk's output, which stays until backward ends, where heads are detached."""
    is_cut = job.settings.training.detach_heads and job.settings.model.num_prediction_heads > 1
    return block_input(job) if is_cut else 0


def _projections(job: PlannedJob) -> tuple[int, int]:
    """Width of a token's queries, and of its keys, which is that of its values."""
    width = attention_head_dim(job.settings.model)
    return job.settings.model.num_attention_heads * width, _key_value_heads(job) * width


def _key_value_heads(job: PlannedJob) -> int:
    return job.settings.model.num_key_value_heads or job.settings.model.num_attention_heads


def _repeats_heads(job: PlannedJob) -> bool:
    """True where each key and value is copied for every query head that shares it.

    torch 2.11's flash attention needs that, and on a GPU attention under a mask, which float32 has.
    """
    return job.on_gpu and (job.dtype_bytes == FLOAT32 or not transformer.flash_kernel()[1])


def _compiles(job: PlannedJob) -> bool:
    """True if RoPE and SwiGLU's product are compiled (assuming that the machine can compile)."""
    training = job.settings.training
    device_type = "cuda" if job.on_gpu else "cpu"
    return compiles(training.compile, training.activation_checkpointing, device_type)


def _log_sum_exp(job: PlannedJob) -> int:
    """Attention's saved log-sum-exp, in bytes per token."""
    return job.settings.model.num_attention_heads * FLOAT32


def _saved_by_norm(job: PlannedJob, width: int, rows: int = 1) -> int:
    """Bytes per token that an RMSNorm saves beside its input and output.

    These are `rows` reciprocal root mean squares; on a CPU also the normalised values in float32, and in bf16 a float32 copy of
    the input, which then replaces the input itself.
    """
    composed = 0 if job.on_gpu else width * FLOAT32 * (2 if _norm_casts(job) else 1)
    return rows * FLOAT32 + composed


def _norm_casts(job: PlannedJob) -> bool:
    """True if RMSNorm is composed of float32 operations on a bf16 input: bf16 on a CPU."""
    return not job.on_gpu and job.dtype_bytes != FLOAT32


def _batch(job: PlannedJob) -> int:
    """The batch: tokens, document and source ids, targets and validity of a step's micro-batches.

    On a GPU the next step's batches are prefetched meanwhile. One micro-batch also has its document mask (CPU) and a few
    float32, int64 and bool tensors of its pairs.
    """
    heads = job.settings.model.num_prediction_heads
    pairs = job.num_tokens * heads
    arriving = job.micro_steps * job.num_tokens * (8 + 4 + 8) * (2 if job.on_gpu else 1)
    batches = arriving + job.micro_steps * pairs * (8 + 1)
    mask = 0 if job.on_gpu else job.num_tokens * job.settings.data.sequence_length
    return batches + mask + pairs * 32
