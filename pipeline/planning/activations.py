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
from pipeline.planning.case import FLOAT32, Case
from pipeline.weighting.cross_entropy import MOVES, rows_per_chunk


def block_input(case: Case) -> int:
    """The residual stream as it enters a block; all heads share one."""
    return case.num_tokens * case.settings.model.dim * case.width


def saved_by_block(case: Case) -> int:
    """All that one block saves beside its input when nothing is made again."""
    model = case.settings.model
    query, key = _projections(case)
    # gate, its SiLU, up, and their product, which goes into down; compiled, the SiLU is made again.
    feed_forward = (3 if _compiles(case) else 4) * ffn_dim(model)
    attended = query if _repeats_heads(case) else key
    values = 2 * query + 2 * attended + 2 * model.dim + feed_forward  # Query, output, key, value, what both norms give.
    into_norms, norms = model.dim, 2 * _norm(case, model.dim)  # The stream between the block's halves.
    if model.qk_norm:
        # What these give is not saved, because rotating saves nothing of what it rotates.
        into_norms += query + key
        norms += _norm(case, query, model.num_attention_heads) + _norm(case, key, _key_value_heads(case))
    if not _casts(case):
        values += into_norms
    mask = 0 if case.on_gpu else case.settings.data.sequence_length * case.width
    return case.num_tokens * (values * case.width + norms + mask + _log_sum(case))


def kept_by_block(case: Case) -> int:
    """What waits for backward beside the block's input, by `training.activation_checkpointing`."""
    model = case.settings.model
    query, key = _projections(case)
    if case.settings.training.activation_checkpointing == "none":
        return saved_by_block(case)
    if case.settings.training.activation_checkpointing == "full":
        return 0
    # The outputs of seven products and of attention (`recompute.KEPT`), needed or not.
    values = 2 * query + 2 * key + 2 * model.dim + 2 * ffn_dim(model)
    return case.num_tokens * (values * case.width + _log_sum(case))


def made_again(case: Case) -> int:
    """What a checkpointed block's second forward adds while its backward runs: all that is saved, but for what was kept of
    it: the values, what attention gave, and the feed-forward layer's gate and up."""
    if case.settings.training.activation_checkpointing == "none":
        return 0
    if case.settings.training.activation_checkpointing == "full":
        return saved_by_block(case)
    query, key = _projections(case)
    kept_value = 0 if _repeats_heads(case) else key  # The repeated one is made again.
    kept = (query + kept_value + 2 * ffn_dim(case.settings.model)) * case.width + _log_sum(case)
    return saved_by_block(case) - case.num_tokens * kept


def waiting(case: Case) -> int:
    """All blocks' activations when the last head is done, and the batch itself."""
    model = case.settings.model
    blocks = model.num_layers - 1 + model.num_prediction_heads
    return blocks * kept_by_block(case) + model.num_layers * block_input(case) + _batch(case)


def stacked(case: Case) -> int:
    """[N, H, D], the heads' outputs side by side."""
    return block_input(case) * case.settings.model.num_prediction_heads


def normalised(case: Case) -> int:
    """What the final norm saves and gives."""
    model = case.settings.model
    return stacked(case) + case.num_tokens * model.num_prediction_heads * _norm(case, model.dim)


def in_loss(case: Case) -> int:
    """What the loss phase holds at once, the hidden states left out."""
    model = case.settings.model
    if case.settings.training.loss_phase == "dense":
        # cross_entropy saves each head's log-probabilities; the last head's logits are there as well.
        logits = case.num_tokens * case.vocab_size
        return (model.num_prediction_heads + 1) * logits * FLOAT32 + _cast_for_dense(case)
    rows = rows_per_chunk(case.num_tokens, case.vocab_size, "cuda" if case.on_gpu else "cpu")
    chunk = rows * case.vocab_size
    # bf16: a chunk's logit gradients are cast, and its part of the weight's gradient comes in bf16 before it is added.
    casting = 0 if case.width == FLOAT32 else (chunk + case.unembedding) * case.width
    if casting and not case.on_gpu:
        casting += case.unembedding * FLOAT32  # There torch adds tensors of two precisions by way of a copy of the one.
    rows_at_work = 2 * rows * model.dim * case.width
    return gradients_of_loss(case) + chunk * FLOAT32 + chunk * FLOAT32 // MOVES + casting + rows_at_work


def gradients_of_loss(case: Case) -> int:
    """What the loss phase makes at once and backward then takes: the hidden states' gradient, and the unembedding's in
    float32. `dense` makes them in backward."""
    return stacked(case) + case.unembedding * FLOAT32


def in_backward_of_norm(case: Case) -> int:
    """Backward's first steps, beside what is saved: the gradients of the norm's output and input, and on a CPU four
    intermediates of the composed one in float32."""
    hidden = stacked(case)
    return 2 * hidden if case.on_gpu else 4 * hidden * FLOAT32 // case.width


def in_backward_of_dense(case: Case) -> int:
    """The oracle's backward: a head's logit gradients, and the unembedding's gradient twice."""
    logits = case.num_tokens * case.vocab_size
    saved = case.settings.model.num_prediction_heads * logits * FLOAT32 + _cast_for_dense(case)
    return saved + logits * FLOAT32 + 2 * case.unembedding * FLOAT32 + stacked(case)


def _cast_for_dense(case: Case) -> int:
    """What the oracle's float32 products keep beside factors in bf16: both factors in float32."""
    if case.width == FLOAT32:
        return 0
    return stacked(case) * FLOAT32 // case.width + case.unembedding * FLOAT32


def in_backward_of_block(case: Case) -> int:
    """While one block's backward runs, beside what is saved: what is made again, the gradients of the stream and of two of
    the feed-forward layer's tensors."""
    wide = 2 * case.num_tokens * ffn_dim(case.settings.model) * case.width
    return made_again(case) + stacked(case) + 2 * block_input(case) + wide


def _projections(case: Case) -> tuple[int, int]:
    """Widths of a token's queries, and of its keys (and of its values)."""
    width = attention_head_dim(case.settings.model)
    return case.settings.model.num_attention_heads * width, _key_value_heads(case) * width


def _key_value_heads(case: Case) -> int:
    return case.settings.model.num_key_value_heads or case.settings.model.num_attention_heads


def _repeats_heads(case: Case) -> bool:
    """Whether each key and value is copied for all query heads that share it, and saved so: torch 2.11's flash attention."""
    return case.on_gpu and case.width != FLOAT32 and not transformer.FLASH_GROUPS_HEADS


def _compiles(case: Case) -> bool:
    """Whether RoPE and SwiGLU's product are compiled, on a machine that can."""
    training = case.settings.training
    device_type = "cuda" if case.on_gpu else "cpu"
    return elementwise_for(training.compile, training.activation_checkpointing, device_type) is not EAGER


def _log_sum(case: Case) -> int:
    """Attention's log-sum-exp, bytes a token."""
    return case.settings.model.num_attention_heads * FLOAT32


def _norm(case: Case, width: int, rows: int = 1) -> int:
    """Bytes a token that an RMSNorm saves beside its input and output: the inverse roots of `rows` mean squares, on a CPU the
    normalised values in float32, and in bf16 a float32 copy of its input in the input's place."""
    composed = 0 if case.on_gpu else width * FLOAT32 * (2 if _casts(case) else 1)
    return rows * FLOAT32 + composed


def _casts(case: Case) -> bool:
    """Whether an RMSNorm is composed of operations in another precision than its input's."""
    return not case.on_gpu and case.width != FLOAT32


def _batch(case: Case) -> int:
    """Tokens, document and source numbers, targets and validity of a step's micro-batches, and on a GPU as many that arrive
    meanwhile; the document mask of one, and a few float32, int64 and bool tensors of its pairs."""
    heads = case.settings.model.num_prediction_heads
    pairs = case.num_tokens * heads
    arriving = case.micro_steps * case.num_tokens * (8 + 4 + 8) * (2 if case.on_gpu else 1)
    batches = arriving + case.micro_steps * pairs * (8 + 1)
    mask = 0 if case.on_gpu else case.num_tokens * case.settings.data.sequence_length
    return batches + mask + pairs * 32
