"""The shapes of models by name: what `model.size` stands for.

Each is the shape of a published model of the Llama family, so that its weights can be started from. The names count the trunk
and head 0; further prediction heads come on top.
"""

MODEL_SIZES: dict[str, dict[str, int | None]] = {
    # GPT-2's small and medium sizes (Radford et al. 2019), with SwiGLU of the same number of values.
    "125m": {"dim": 768, "num_layers": 12, "num_attention_heads": 12, "num_key_value_heads": None, "ffn_dim": 2048},
    "350m": {"dim": 1024, "num_layers": 24, "num_attention_heads": 16, "num_key_value_heads": None, "ffn_dim": 2816},
    # TinyLlama 1.1B, arXiv 2401.02385.
    "1b": {"dim": 2048, "num_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "ffn_dim": 5632},
    # Llama 3.2 3B, arXiv 2407.21783 (with an unembedding of its own).
    "3b": {"dim": 3072, "num_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "ffn_dim": 8192},
    # Mistral 7B, arXiv 2310.06825; Llama 3 8B has the same blocks and a larger vocabulary.
    "7b": {"dim": 4096, "num_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "ffn_dim": 14336},
    # Llama 2 13B and 70B, arXiv 2307.09288.
    "13b": {"dim": 5120, "num_layers": 40, "num_attention_heads": 40, "num_key_value_heads": None, "ffn_dim": 13824},
    "70b": {"dim": 8192, "num_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "ffn_dim": 28672},
}
"""Settings of section `model` by the name of a size."""


def departures(size: str | None, model: dict[str, object]) -> list[str]:
    """Say which settings of section `model` are not those of its size, because they were given; nothing without a size."""
    shape = {} if size is None else MODEL_SIZES[size]
    return [
        f"model.{key}: {model[key]} as given, where size {size} has {value}"
        for key, value in shape.items()
        if model[key] != value
    ]
