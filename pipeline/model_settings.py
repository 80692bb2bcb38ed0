"""Settings of section `model`."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.rope_settings import RopeScaling
from pipeline.setting_types import ChangesResult, Fixed, Free, NonNegative, PositiveFloat, Section, Size, UserPath


class ModelSettings(Section):
    """Section `model`: the policy's shape and initial weights."""

    size: Free[Literal["125m", "350m", "1b", "3b", "7b", "13b", "70b"] | None] = None
    """Shape by name (pipeline/model_sizes.py): dim, num_layers, attention and key-value heads, ffn_dim; of these, what is set
    beside it wins. null: all by themselves."""
    dim: Fixed[Size] = 512
    """D, width of the hidden states."""
    num_layers: Fixed[Size] = 8
    """Depth of the next-token path: a trunk of num_layers - 1 blocks, then head 0's block."""
    num_attention_heads: Fixed[Size] = 8
    """Attention heads per block."""
    num_key_value_heads: Fixed[Size | None] = None
    """Key and value heads (grouped-query attention); null: as many as attention heads."""
    head_dim: Fixed[Size | None] = None
    """Width of an attention head; null: dim / num_attention_heads."""
    ffn_dim: Fixed[Size | None] = None
    """Width of the SwiGLU layer; null: 8/3 of dim, rounded up to a multiple of 64."""
    vocab_size: Fixed[Annotated[int, Field(gt=0, le=2**32)] | None] = None
    """V; null: the data's."""
    num_prediction_heads: Fixed[Size] = 4
    """H: head h predicts the token h + 1 places ahead. 1 is ordinary next-token training."""
    rope_theta: ChangesResult[PositiveFloat] = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: ChangesResult[RopeScaling | None] = None
    """Scaling of the rotary positions: `{rope_type: linear, llama3 or yarn, factor: …}`, with the keys of Hugging Face's
    config.json; null: none."""
    norm_eps: ChangesResult[PositiveFloat] = 1e-5
    """Added to the mean square in RMSNorm."""
    attention_bias: Fixed[bool] = False
    """Bias on query, key and value projections (Qwen2)."""
    attention_output_bias: Fixed[bool] = False
    """Bias on attention's output projection too (Llama and Qwen3 whose config.json has attention_bias)."""
    mlp_bias: Fixed[bool] = False
    """Bias on the three projections of the feed-forward layer (Llama)."""
    qk_norm: Fixed[bool] = False
    """RMSNorm on queries and keys, per attention head (Qwen3)."""
    tied_embeddings: Fixed[bool] = False
    """Share one matrix between embedding and unembedding."""
    seed: Fixed[NonNegative] = 0
    """Seed of the initial weights."""
    pretrained: Free[UserPath | None] = None
    """Directory of a causal language model (config.json, *.safetensors) to start from. What this section does not give
    of the shape is read there; what it gives must be equal."""
    new_heads: Fixed[Literal["copied", "fresh"]] = "copied"
    """Initial weights of prediction heads that the pretrained model lacks: copies of its last block (`copied`), or random ones
    as without it (`fresh`)."""
