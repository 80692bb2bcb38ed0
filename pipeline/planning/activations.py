"""What a forward and its losses leave for backward, and what backward adds while it works.

Counted from the operations of `model.transformer`, `model.mtp` and `weighting`, tensor by tensor, as autograd saves them. The
project's own code is what is counted, so a change there is a change here; unit tests compare with what autograd really saves.

On a GPU RMSNorm is one kernel that saves its input; on a CPU torch composes it of operations that save float32
intermediates. On a CPU attention goes through a mask, which becomes numbers in each block.

Shapes: N tokens of a micro-batch, D width, F width of the feed-forward layer, V vocabulary, H heads, C rows of a chunk.
"""

from pipeline.model import transformer
from pipeline.model.elementwise import EAGER, elementwise_for
from pipeline.model.transformer import attention_head_dim, ffn_dim
from pipeline.planning.planned_job import FLOAT32, PlannedJob
from pipeline.weighting.cross_entropy import MOVES, rows_per_chunk


def block_input(job: PlannedJob) -> int:
    """The residual stream as it enters a block; all heads share one."""
    return job.num_tokens * job.settings.model.dim * job.dtype_bytes


def saved_by_block(job: PlannedJob) -> int:
    """All that one block saves beside its input when nothing is made again."""
    model = job.settings.model
    query, key = _projections(job)
    # gate, its SiLU, up, and their product, which goes into down; compiled, the SiLU is made again.
    feed_forward = (3 if _compiles(job) else 4) * ffn_dim(model)
    attended = query if _repeats_heads(job) else key
    values = 2 * query + 2 * attended + 2 * model.dim + feed_forward  # Query, output, key, value, what both norms give.
    into_norms, norms = model.dim, 2 * _saved_by_norm(job, model.dim)  # The stream between the block's halves.
    if model.qk_norm:
        # What these give is not saved, because rotating saves nothing of what it rotates.
        into_norms += query + key
        norms += _saved_by_norm(job, query, model.num_attention_heads) + _saved_by_norm(job, key, _key_value_heads(job))
    if not _norm_casts(job):
        values += into_norms
    mask = 0 if job.on_gpu else job.settings.data.sequence_length * job.dtype_bytes
    return job.num_tokens * (values * job.dtype_bytes + norms + mask + _log_sum_exp(job))


def saved_by_checkpointed_block(job: PlannedJob) -> int:
    """What waits for backward beside the block's input, by `training.activation_checkpointing`."""
    model = job.settings.model
    query, key = _projections(job)
    if job.settings.training.activation_checkpointing == "none":
        return saved_by_block(job)
    if job.settings.training.activation_checkpointing == "full":
        return 0
    # The outputs of seven products and of attention (`recompute.SAVED_OPERATIONS`), needed or not.
    values = 2 * query + 2 * key + 2 * model.dim + 2 * ffn_dim(model)
    return job.num_tokens * (values * job.dtype_bytes + _log_sum_exp(job))


def recomputed(job: PlannedJob) -> int:
    """What a checkpointed block's second forward adds while its backward runs: all that is saved, but for what was kept of
    it: the values, what attention gave, and the feed-forward layer's gate and up."""
    if job.settings.training.activation_checkpointing == "none":
        return 0
    if job.settings.training.activation_checkpointing == "full":
        return saved_by_block(job)
    query, key = _projections(job)
    kept_value = 0 if _repeats_heads(job) else key  # The repeated one is made again.
    kept = (query + kept_value + 2 * ffn_dim(job.settings.model)) * job.dtype_bytes + _log_sum_exp(job)
    return saved_by_block(job) - job.num_tokens * kept


def saved_for_backward(job: PlannedJob) -> int:
    """All blocks' activations when the last head is done, and the batch itself."""
    model = job.settings.model
    blocks = model.num_layers - 1 + model.num_prediction_heads
    return blocks * saved_by_checkpointed_block(job) + model.num_layers * block_input(job) + _batch(job)


def head_outputs(job: PlannedJob) -> int:
    """[N, H, D], the heads' outputs side by side."""
    return block_input(job) * job.settings.model.num_prediction_heads


def final_norm(job: PlannedJob) -> int:
    """What the final norm saves and gives."""
    model = job.settings.model
    return head_outputs(job) + job.num_tokens * model.num_prediction_heads * _saved_by_norm(job, model.dim)


def loss_phase(job: PlannedJob) -> int:
    """What the loss phase holds at once, the hidden states left out."""
    model = job.settings.model
    if job.settings.training.loss_phase == "dense":
        # cross_entropy saves each head's log-probabilities; the last head's logits are there as well.
        logits = job.num_tokens * job.vocab_size
        return (model.num_prediction_heads + 1) * logits * FLOAT32 + _dense_loss_casts(job)
    rows = rows_per_chunk(job.num_tokens, job.vocab_size, "cuda" if job.on_gpu else "cpu")
    chunk = rows * job.vocab_size
    # bf16: a chunk's logit gradients are cast, and its part of the weight's gradient comes in bf16 before it is added.
    casting = 0 if job.dtype_bytes == FLOAT32 else (chunk + job.embedding_size) * job.dtype_bytes
    if casting and not job.on_gpu:
        casting += job.embedding_size * FLOAT32  # There torch adds tensors of two precisions by way of a copy of the one.
    rows_at_work = 2 * rows * model.dim * job.dtype_bytes
    return loss_gradients(job) + chunk * FLOAT32 + chunk * FLOAT32 // MOVES + casting + rows_at_work


def loss_gradients(job: PlannedJob) -> int:
    """What the loss phase makes at once and backward then takes: the hidden states' gradient, and the unembedding's in
    float32. `dense` makes them in backward."""
    return head_outputs(job) + job.embedding_size * FLOAT32


def norm_backward(job: PlannedJob) -> int:
    """Backward's first steps, beside what is saved: the gradients of the norm's output and input, and on a CPU four
    intermediates of the composed one in float32."""
    hidden = head_outputs(job)
    return 2 * hidden if job.on_gpu else 4 * hidden * FLOAT32 // job.dtype_bytes


def dense_loss_backward(job: PlannedJob) -> int:
    """The oracle's backward: a head's logit gradients, and the unembedding's gradient twice."""
    logits = job.num_tokens * job.vocab_size
    saved = job.settings.model.num_prediction_heads * logits * FLOAT32 + _dense_loss_casts(job)
    return saved + logits * FLOAT32 + 2 * job.embedding_size * FLOAT32 + head_outputs(job)


def _dense_loss_casts(job: PlannedJob) -> int:
    """What the oracle's float32 products keep beside factors in bf16: both factors in float32."""
    if job.dtype_bytes == FLOAT32:
        return 0
    return head_outputs(job) * FLOAT32 // job.dtype_bytes + job.embedding_size * FLOAT32


def block_backward(job: PlannedJob) -> int:
    """While one block's backward runs, beside what is saved: what is made again, the gradients of the stream and of two of
    the feed-forward layer's tensors."""
    wide = 2 * job.num_tokens * ffn_dim(job.settings.model) * job.dtype_bytes
    return recomputed(job) + head_outputs(job) + 2 * block_input(job) + wide


def _projections(job: PlannedJob) -> tuple[int, int]:
    """Widths of a token's queries, and of its keys (and of its values)."""
    width = attention_head_dim(job.settings.model)
    return job.settings.model.num_attention_heads * width, _key_value_heads(job) * width


def _key_value_heads(job: PlannedJob) -> int:
    return job.settings.model.num_key_value_heads or job.settings.model.num_attention_heads


def _repeats_heads(job: PlannedJob) -> bool:
    """Whether each key and value is copied for all query heads that share it, and saved so: torch 2.11's flash attention."""
    return job.on_gpu and job.dtype_bytes != FLOAT32 and not transformer.FLASH_SUPPORTS_GQA


def _compiles(job: PlannedJob) -> bool:
    """Whether RoPE and SwiGLU's product are compiled, on a machine that can."""
    training = job.settings.training
    device_type = "cuda" if job.on_gpu else "cpu"
    return elementwise_for(training.compile, training.activation_checkpointing, device_type) is not EAGER


def _log_sum_exp(job: PlannedJob) -> int:
    """Attention's log-sum-exp, bytes a token."""
    return job.settings.model.num_attention_heads * FLOAT32


def _saved_by_norm(job: PlannedJob, width: int, rows: int = 1) -> int:
    """Bytes a token that an RMSNorm saves beside its input and output: the inverse roots of `rows` mean squares, on a CPU the
    normalised values in float32, and in bf16 a float32 copy of its input in the input's place."""
    composed = 0 if job.on_gpu else width * FLOAT32 * (2 if _norm_casts(job) else 1)
    return rows * FLOAT32 + composed


def _norm_casts(job: PlannedJob) -> bool:
    """Whether an RMSNorm is composed of operations in another precision than its input's."""
    return not job.on_gpu and job.dtype_bytes != FLOAT32


def _batch(job: PlannedJob) -> int:
    """Tokens, document and source numbers, targets and validity of a step's micro-batches, and on a GPU as many that arrive
    meanwhile; the document mask of one, and a few float32, int64 and bool tensors of its pairs."""
    heads = job.settings.model.num_prediction_heads
    pairs = job.num_tokens * heads
    arriving = job.micro_steps * job.num_tokens * (8 + 4 + 8) * (2 if job.on_gpu else 1)
    batches = arriving + job.micro_steps * pairs * (8 + 1)
    mask = 0 if job.on_gpu else job.num_tokens * job.settings.data.sequence_length
    return batches + mask + pairs * 32
