"""Meta's own layout of Llama models: `params.json`, `consolidated.safetensors`, `extra_heads` that predict further tokens.

It is that of facebook/multi-token-prediction (arXiv 2404.19737). Meta publishes pickles, which are never executed here: the
README has the lines by which users convert theirs. Tensors have names of their own, and rotary positions turn neighbouring
values of an attention head, (0, 1), (2, 3) …, where ours turn the halves, (0, K/2), (1, K/2 + 1) …: `arranged` permutes the
rows of queries and keys accordingly.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.model_config import ModelFilesError, impossible_heads, read_json
from pipeline.setting_types import Positive, PositiveFloat, Section, Size, rule_of

PARAMS_FILE = "params.json"

_TOP_NAMES = {"embed.weight": "tok_embeddings.weight", "unembed.norm.weight": "norm.weight", "unembed.weight": "output.weight"}
_BLOCK_NAMES = {
    "attention_norm": "attention_norm",
    "attention.query": "attention.wq",
    "attention.key": "attention.wk",
    "attention.value": "attention.wv",
    "attention.output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "feed_forward.w1",
    "ffn.up": "feed_forward.w3",
    "ffn.down": "feed_forward.w2",
}


class _Params(Section):
    """The keys of params.json, with the defaults of Meta's ModelArgs; an unknown one may be a feature, and is refused."""

    dim: Size
    n_layers: Size
    n_heads: Size
    n_kv_heads: Size | None = None
    vocab_size: int = -1
    multiple_of: Positive = 256
    ffn_dim_multiplier: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000.0
    use_scaled_rope: bool = False
    n_future_tokens: Size = 1
    max_batch_size: Positive | None = None
    max_seq_len: Positive | None = None


def meta_settings(directory: Path, vocab_size: int | None) -> ModelSettings:
    """Read the shape of a model from its params.json.

    vocab_size: rows of the embedding, for a params.json that leaves it to the tokenizer (-1).

    Raises:
        ModelFilesError: params.json is missing or makes no sense, or names what this package does not compute.
    """
    params = _read(directory)
    if params.use_scaled_rope:
        raise ModelFilesError(
            f"{directory}: use_scaled_rope is true in {PARAMS_FILE}, which does not say how; use Hugging Face's form of it"
        )
    # `n_layers` counts the blocks of all heads: `layers` has n_layers − n_future_tokens + 1, of which the last is head 0's, and
    # `extra_heads` the others. (Read in two ports of Meta's code, to torch and to MLX.) The width of SwiGLU is by the rule of
    # its FeedForward.
    ffn_dim = int((params.ffn_dim_multiplier or 1) * int(2 * 4 * params.dim / 3))
    try:
        settings = ModelSettings(
            dim=params.dim,
            num_layers=params.n_layers - params.n_future_tokens + 1,
            num_attention_heads=params.n_heads,
            num_key_value_heads=params.n_kv_heads,
            ffn_dim=-(-ffn_dim // params.multiple_of) * params.multiple_of,
            vocab_size=params.vocab_size if params.vocab_size != -1 else vocab_size,
            num_prediction_heads=params.n_future_tokens,
            rope_theta=params.rope_theta,
            norm_eps=params.norm_eps,
        )
    except ValidationError as error:
        raise _senseless(directory, error) from None
    problem = impossible_heads(settings)
    if problem is not None:
        raise ModelFilesError(f"{directory}: {PARAMS_FILE} makes no sense: {problem}")
    return settings


def meta_longest_row(directory: Path) -> int | None:
    """Read how many tokens a row may have; None if params.json does not say."""
    return _read(directory).max_seq_len


def meta_name(name: str, settings: ModelSettings) -> str:
    """Meta's name of our parameter `name`: `heads.0.ffn.up.weight` -> `layers.LAST.feed_forward.w3.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    module_list, index, rest = name.split(".", 2)
    block = f"{_BLOCK_NAMES[rest.removesuffix('.weight')]}.weight"
    if module_list == "trunk":
        return f"layers.{index}.{block}"
    return f"layers.{settings.num_layers - 1}.{block}" if index == "0" else f"extra_heads.{int(index) - 1}.{block}"


def arranged(name: str, tensor: Tensor, settings: ModelSettings) -> Tensor:
    """Put a tensor's rows in our order: of each attention head's queries and keys the even ones first, then the odd ones."""
    heads = {
        "attention.query.weight": settings.num_attention_heads,
        "attention.key.weight": settings.num_key_value_heads or settings.num_attention_heads,
    }
    num_heads = next((number for end, number in heads.items() if name.endswith(end)), None)
    if num_heads is None:
        return tensor
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _read(directory: Path) -> _Params:
    content: dict[str, Any] = read_json(directory / PARAMS_FILE)
    try:
        return _Params.model_validate(content, strict=True)
    except ValidationError as error:
        raise _senseless(directory, error) from None


def _senseless(directory: Path, error: ValidationError) -> ModelFilesError:
    problems = (
        f"{'.'.join(map(str, detail['loc']))}: "
        + ("unknown, it may name what is not computed here" if detail["type"] == "extra_forbidden" else _said(detail))
        for detail in error.errors()
    )
    return ModelFilesError(f"{directory}: {PARAMS_FILE} makes no sense: {'; '.join(problems)}")


def _said(detail: Any) -> str:
    return "not set; it must be" if detail["type"] == "missing" else f"got {detail['input']!r}; {rule_of(detail)}"
