"""Write head 1 as an EAGLE-3 drafter (arXiv 2503.01840) of one token, which serving engines run beside the exported model.

It is exact, because a head is a block on the trunk's output, and an EAGLE-3 layer is a block on a mixture of three hidden
states of the model, beside the embedding of the next token. The mixture is made to pick the trunk's output, and the layer to
ignore the embedding:

    fc = [0 | 0 | I]                    of the three states the last, which is the input of the model's last layer
    q, k, v = [0 | W]                   the left half reads the embedding, the right half the state
    hidden_norm = the head's attention norm, post_attention_layernorm = its feed-forward norm

At position t EAGLE-3 has the state of t and the embedding of token t + 1, and drafts token t + 2: so does head 1. Deeper heads
have no place in it, because a second token would be drafted by the same layer from its own output.

The engines differ in how a state is named. vLLM and speculators count states: i is the input of layer i, so the trunk's output
is num_layers − 1. SGLang counts outputs of layers, one less (and some of its models do so only if the first is 1).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.export import TextConventions
from pipeline.model.layout import export_name
from pipeline.model.model_config import CONFIG_FILE, config_of
from pipeline.model.transformer import Block
from pipeline.model.weight_files import WEIGHTS_FILE, Weights
from pipeline.storage.whole_file import naming, sync_file, write_file

VLLM, SGLANG = "vllm", "sglang"
VERIFIER = "verifier"
"""Folder of the model, in the drafter's."""
_FEWEST_LAYERS = 4
_LAYER = {VLLM: "layers.0", SGLANG: "midlayer"}
_NORMS = {"input_layernorm": "hidden_norm"}
"""Names of the layer's that mean something else than in an ordinary block."""


def drafter_problem(settings: ModelSettings, engine: str) -> str | None:
    """Say why head 1 of a model cannot be a drafter for this engine; None if it can."""
    if settings.num_prediction_heads < 2:
        return "the model has head 0 alone, and no head that could draft"
    if settings.num_layers < _FEWEST_LAYERS:
        return (
            f"the model has {settings.num_layers} layers; an EAGLE-3 drafter reads three different states between layers, so "
            f"expected at least {_FEWEST_LAYERS}"
        )
    config = config_of(settings)
    has_bias = config.get("attention_bias") or config.get("mlp_bias")
    if engine == SGLANG and (config["model_type"] != "llama" or has_bias):
        form = f"{config['model_type']}{' with biases' if has_bias else ''}"
        return f"the model has the form of {form}, and SGLang's EAGLE-3 layer is Llama's without biases; use --engine vllm"
    return None


def write_drafter(
    directory: Path, settings: ModelSettings, weights: Weights, dtype: torch.dtype, text: TextConventions, engine: str
) -> None:
    """Write a drafter into an existing directory, config.json last. In memory are one block and two matrices of V × D.

    weights: by the names in `MTPModel`.
    """
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in drafter_tensors(settings, weights, engine)}
    path = directory / WEIGHTS_FILE
    with naming(path):
        save_file(tensors, path, metadata={"format": "pt"})
    sync_file(path)
    config = drafter_config(settings, dtype, text, engine)
    write_file(directory / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())


def drafter_tensors(settings: ModelSettings, weights: Weights, engine: str) -> Iterator[tuple[str, Tensor]]:
    """Make the drafter's tensors, in the dtypes of the weights, by their names in its file."""
    layer = _LAYER[engine]
    with torch.device("meta"):
        names = [name for name, _ in Block(settings).named_parameters()]
    for name in names:
        theirs, kind = export_name(f"heads.1.{name}", settings).removeprefix("prediction_heads.1.").rsplit(".", 1)
        tensor = weights.tensor(f"heads.1.{name}")
        if kind == "weight" and theirs.endswith(("q_proj", "k_proj", "v_proj")):
            tensor = torch.cat([torch.zeros_like(tensor), tensor], dim=1)
        yield f"{layer}.{_NORMS.get(theirs, theirs)}.{kind}", tensor

    # Where Llama's form has a bias on queries it has one on the output, which Qwen2's has not.
    if "attention.query.bias" in names and "attention.output.bias" not in names:
        yield f"{layer}.self_attn.o_proj.bias", torch.zeros(settings.dim)
    yield f"{layer}.input_layernorm.weight", torch.ones(settings.dim)
    yield "fc.weight", torch.cat([torch.zeros(settings.dim, 2 * settings.dim), torch.eye(settings.dim)], dim=1)
    yield "norm.weight", weights.tensor("unembed.norm.weight")
    if engine == VLLM:
        # The layer multiplies it by zero, which is not zero where it is left as memory happens to be: by `from_pretrained` of
        # speculators, and by vLLM with pipeline parallelism, if there is no such tensor. SGLang always takes the model's.
        yield "embed_tokens.weight", weights.tensor("embed.weight")
    yield "lm_head.weight", weights.tensor("embed.weight" if settings.tied_embeddings else "unembed.weight")


def state_ids(num_layers: int) -> list[int]:
    """Return three states, each by the layer whose input it is: ascending, different, the trunk's output last."""
    if num_layers == _FEWEST_LAYERS:
        return [1, 2, 3]
    # The second is the lowest, so that SGLang's lowest number is 1, by which some of its models know that it counts outputs.
    return [2, max(3, num_layers // 2), num_layers - 1]


def drafter_config(settings: ModelSettings, dtype: torch.dtype, text: TextConventions, engine: str) -> dict[str, Any]:
    """Return the content of config.json as the engine reads it."""
    layer = _layer_config(settings, dtype, text)
    ids = state_ids(settings.num_layers)
    if engine == SGLANG:
        outputs = {"eagle_aux_hidden_state_layer_ids": [each - 1 for each in ids], "use_aux_hidden_state": True}
        vocabulary = {"draft_vocab_size": settings.vocab_size}
        return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **vocabulary, "eagle_config": outputs}

    # vLLM takes an absent norm_before_residual for true.
    verifier = {"name_or_path": VERIFIER, "architectures": config_of(settings)["architectures"]}
    proposal = {"proposal_type": "greedy", "speculative_tokens": 1, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "torch_dtype": layer["torch_dtype"],
        "draft_vocab_size": settings.vocab_size,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": ids,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
    }


def _layer_config(settings: ModelSettings, dtype: torch.dtype, text: TextConventions) -> dict[str, Any]:
    """The shape of the drafter's one layer, in the form of Llama or Qwen3."""
    config = config_of(settings)
    left_out = ("architectures", "num_prediction_heads")
    layer = {key: value for key, value in config.items() if key not in left_out}
    if config["model_type"] == "qwen2":
        layer |= {"model_type": "llama", "attention_bias": True}
    return layer | {
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "max_position_embeddings": text.context_length,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **text.special_ids,
    }


def drafter_verifier(directory: Path) -> Path | None:
    """Return the folder of the model that a drafter's folder names, as a folder in it; None if it is no drafter's."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_drafter = isinstance(config, dict) and ("speculators_config" in config or "eagle_config" in config)
    return directory / VERIFIER if is_drafter else None
