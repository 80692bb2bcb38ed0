"""The two layouts of a model folder: Hugging Face's (config.json) and Meta's (params.json).

A layout says which file describes the model, what each of our parameters is called in the weight files, and how its rows lie
there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.meta import PARAMS_FILE, arranged, meta_longest_row, meta_name, meta_settings
from pipeline.model.model_config import CONFIG_FILE, LongestRow, longest_row, read_json, settings_from_config
from pipeline.model.weight_files import META_WEIGHTS_FILE, is_of_meta, weight_files

_TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "unembed.norm.weight": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}


class Layout(NamedTuple):
    """Form in which a folder describes a model and names its tensors.

    description: the file that has its shape. layers, heads: how names of tensors begin of its layers, of heads 1, 2, ….
    counts: (key, beginnings, more) of each key there that counts them: its value is the number of those, and so many more.
    """

    description: str
    layers: str
    heads: str
    counts: tuple[tuple[str, tuple[str, ...], int], ...]
    source_name: Callable[[str, ModelSettings], str]
    arranged: Callable[[str, Tensor, ModelSettings], Tensor]


def export_name(name: str, settings: ModelSettings) -> str:
    """Hugging Face's name of our parameter `name`: `heads.0.ffn.up.weight` -> `model.layers.LAST.mlp.up_proj.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    module_list, index, rest = name.split(".", 2)
    stem, kind = rest.rsplit(".", 1)
    block = f"{_BLOCK_NAMES[stem]}.{kind}"
    if module_list == "trunk":
        return f"model.layers.{index}.{block}"
    return f"model.layers.{settings.num_layers - 1}.{block}" if index == "0" else f"prediction_heads.{index}.{block}"


def _as_it_is(_: str, tensor: Tensor, __: ModelSettings) -> Tensor:
    return tensor


HUGGING_FACE = Layout(
    CONFIG_FILE,
    "model.layers",
    "prediction_heads",
    (("num_hidden_layers", ("model.layers",), 0), ("num_prediction_heads", ("prediction_heads",), 1)),
    export_name,
    _as_it_is,
)
META = Layout(
    PARAMS_FILE,
    "layers",
    "extra_heads",
    (("n_layers", ("layers", "extra_heads"), 0), ("n_future_tokens", ("extra_heads",), 1)),
    meta_name,
    arranged,
)


def layout_of(directory: Path) -> Layout:
    """The layout of a model folder; Hugging Face's where it has config.json, or neither description."""
    return META if is_of_meta(directory) else HUGGING_FACE


def read_model_settings(directory: Path) -> ModelSettings:
    """Read the shape of the model in `directory`.

    Raises:
        ModelFilesError: files are missing, or the model has a feature that this package does not implement exactly.
    """
    weight_files(directory)
    return described_settings(directory)


def described_settings(directory: Path) -> ModelSettings:
    """The shape as config.json or params.json has it; of the latter's weights the header is read too."""
    if layout_of(directory) is HUGGING_FACE:
        return settings_from_config(read_json(directory / CONFIG_FILE), directory)
    with safe_open(directory / META_WEIGHTS_FILE, framework="pt") as opened:
        embedding = "tok_embeddings.weight"
        vocab_size = opened.get_slice(embedding).get_shape()[0] if embedding in opened.keys() else None  # noqa: SIM118
    return meta_settings(directory, vocab_size)


def read_longest_row(directory: Path) -> LongestRow | None:
    """Read how many tokens a row of the model in `directory` may have; None if it does not say.

    Raises:
        ModelFilesError: as `read_model_settings`.
    """
    if layout_of(directory) is META:
        num_tokens = meta_longest_row(directory)
        return None if num_tokens is None else LongestRow(num_tokens, "max_seq_len", False)
    config = read_json(directory / CONFIG_FILE)
    settings_from_config(config, directory)
    return longest_row(config)
