"""The useful FLOPs of a step, and the peak of the devices that they are compared with (MFU; arXiv 2204.02311, appendix B).

Useful is what the mathematics asks for: two FLOPs for each weight of a matrix and token, and attention's two products; backward
takes twice forward's. What is computed again to save memory does not count.
"""

from pipeline.config import ModelSettings, Settings
from pipeline.derived import reference_shape
from pipeline.model.transformer import attention_head_dim, ffn_dim

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name, from its makers' data sheets; SXM where nothing else is said."""


def peak_flops(device_name: str) -> float | None:
    """Return the FLOP/s of a device's data sheet; None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def block_flops(shape: ModelSettings, keys_a_query: float) -> float:
    """FLOPs of a block's forward, a token. keys_a_query: tokens that a token attends to, on average."""
    query_dim = shape.num_attention_heads * attention_head_dim(shape)
    key_dim = (shape.num_key_value_heads or shape.num_attention_heads) * attention_head_dim(shape)
    weights = shape.dim * (2 * query_dim + 2 * key_dim + 3 * ffn_dim(shape))
    return 2 * weights + 4 * keys_a_query * query_dim


def logits_flops(shape: ModelSettings) -> float:
    """FLOPs of one head's logits, a token."""
    assert shape.vocab_size is not None
    return 2 * shape.dim * shape.vocab_size


def forward_flops(shape: ModelSettings, keys_a_query: float, num_heads: int = 1) -> float:
    """FLOPs of a forward of trunk and heads, a token."""
    trunk = (shape.num_layers - 1) * block_flops(shape, keys_a_query)
    return trunk + num_heads * (block_flops(shape, keys_a_query) + logits_flops(shape))


def selective_flops(
    shape: ModelSettings, keys_a_query: float, num_heads: int, k_percent: float, reference: ModelSettings | None
) -> float:
    """FLOPs of a whole step, forward and backward, a token. reference: the shape of the live one; None without one.

    Backward makes two products of each of forward's; of logits only for what is selected.
    """
    blocks = shape.num_layers - 1 + num_heads
    logits = num_heads + 2 + 2 * k_percent * (num_heads - 1)
    live = 0.0 if reference is None else forward_flops(reference, keys_a_query, reference.num_prediction_heads)
    return 3 * blocks * block_flops(shape, keys_a_query) + logits * logits_flops(shape) + live


def flops_a_token(settings: Settings, k_percent: float) -> float:
    """FLOPs of a token of training with these settings, as if each document filled its row. k_percent: in the step at hand."""
    shape = settings.model
    keys_a_query = (settings.data.sequence_length + 1) / 2
    return selective_flops(shape, keys_a_query, shape.num_prediction_heads, k_percent, reference_shape(settings))
