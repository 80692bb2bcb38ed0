"""Model folders mean here what they mean to transformers: the same losses, or a refusal by name."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import targets_and_valid
from pipeline.model.export import TextConventions, save_model
from pipeline.model.huggingface import ModelFilesError, load_weights, read_model_settings
from pipeline.model.layout import read_longest_row
from pipeline.model.mtp import MTPModel

transformers = pytest.importorskip("transformers", minversion="5.0")
from huggingface_hub.errors import StrictDataclassError  # noqa: E402 (comes with transformers)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROWS, TOKENS, VOCAB = 2, 24, 31
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
POSITIONS = 64
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0, "beta_fast": 4.0, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "attn_factor": 0.5},
    {"rope_type": "yarn", "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4},
]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """The keys of a small model of one of the families; each key that a family has a default for may be absent."""
    groups, width = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((4, 8)))
    heads = groups * draw(st.sampled_from((1, 2)))
    shape = {
        "model_type": draw(st.sampled_from(FAMILIES)),
        "hidden_size": heads * draw(st.sampled_from((4, 8))),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": draw(st.sampled_from((6, 16))),
        "vocab_size": VOCAB,
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-2))),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(st.sampled_from(ROPES)) | {"rope_theta": draw(st.sampled_from((3.0, 10_000.0, 5e5)))},
        "max_position_embeddings": POSITIONS,
    }
    family = shape["model_type"]
    if family in ("llama", "qwen3"):
        shape["attention_bias"] = draw(st.booleans())
    if family == "llama":
        shape["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        shape["sliding_window"] = draw(st.sampled_from((None, TOKENS, 4096)))
    return shape if family != "qwen3" and draw(st.booleans()) else shape | {"head_dim": width}


CONFIG_EDITS: dict[str, list[Any]] = {
    "rope_theta": [2.0, 1e6, 7],
    "rope_scaling": [
        None,
        {},
        {"type": "default"},
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 9.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "finetuned": True},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]},
    ],
    "rope_parameters": [None, {}, {"rope_theta": 90.0}, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 90.0}],
    "original_max_position_embeddings": [8],
    "partial_rotary_factor": [0.5, 1.0],
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "hidden_act": ["gelu", "silu"],
    "head_dim": [None, 2, 4],
    "num_key_value_heads": [None, 1, 2],
    "num_hidden_layers": [1, 2, 3],
    "max_position_embeddings": [16, 64],
    "use_sliding_window": [True, False],
    "sliding_window": [4, TOKENS, None],
    "max_window_layers": [0, 1],
    "layer_types": [["full_attention"], ["sliding_attention"] * 2],
    "rms_norm_eps": [1, 1e-3],
    "attention_dropout": [0.5],
    "pretraining_tp": [2],
}
TENSOR_EDITS = (
    "no lm_head",
    "another lm_head",
    "equal lm_head",
    "no q_norm",
    "no bias",
    "a bias",
    "a layer more",
    "half",
    "doubles",
)


def edited(tensors: dict[str, torch.Tensor], edit: str) -> dict[str, torch.Tensor]:
    """Weights as a careless tool leaves them."""
    embedding = tensors["model.embed_tokens.weight"]
    q = "model.layers.0.self_attn.q_proj"
    added = {
        "another lm_head": {"lm_head.weight": embedding.flip(0).contiguous()},
        "equal lm_head": {"lm_head.weight": embedding.clone()},
        "a bias": {f"{q}.bias": torch.ones(len(tensors[f"{q}.weight"]))},
        "a layer more": {name.replace("layers.0", "layers.7"): tensor + 0 for name, tensor in tensors.items()},
    }
    removed = {"no lm_head": "lm_head", "no q_norm": "q_norm", "no bias": ".bias"}.get(edit)
    dtype = {"half": torch.float16, "doubles": torch.float64}.get(edit, torch.float32)
    kept = tensors | added.get(edit, {})
    return {name: tensor.to(dtype) for name, tensor in kept.items() if removed is None or removed not in name}


def save(shape: dict[str, Any], directory: Path, seed: int) -> None:
    """A model of transformers with weights so large that any other rule of computing shows in the losses."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * 0.6)
    model.save_pretrained(directory, max_shard_size=("5GB", 2000)[seed % 2])


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(5))


def losses_of_transformers(directory: Path) -> torch.Tensor:
    """float32 [B, T - 1]"""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(tokens()).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), tokens()[:, 1:].flatten(), reduction="none").view(ROWS, TOKENS - 1)


def loaded(directory: Path) -> MTPModel:
    """The model in a folder; refused where rows of TOKENS are too long for it to be exact."""
    shape: ModelSettings = read_model_settings(directory)
    longest = read_longest_row(directory)
    if longest is not None and longest.is_exact and longest.num_tokens < TOKENS:
        raise ModelFilesError("rows too long")
    model = MTPModel(shape)
    assert load_weights(model, directory) == []
    return model


def losses_of(model: MTPModel, tokens_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
    """float32 [B, T - 1]"""
    targets, valid = targets_and_valid(tokens_BT, documents_BT, 1)
    with torch.no_grad():
        return model(tokens_BT, documents_BT, targets, valid)[:, :-1, 0]


def own_losses(directory: Path) -> torch.Tensor:
    """float32 [B, T - 1]"""
    return losses_of(loaded(directory), tokens(), torch.zeros(ROWS, TOKENS, dtype=torch.int32))


def packed_losses(directory: Path) -> torch.Tensor:
    """Both rows of `tokens` as two documents of one row, which is twice as long: float32 [B, T - 1]."""
    documents = torch.arange(ROWS, dtype=torch.int32).repeat_interleave(TOKENS)[None]
    losses = losses_of(loaded(directory), tokens().view(1, -1), documents)[0]
    return torch.stack([losses[: TOKENS - 1], losses[TOKENS:]])


MANY = settings(max_examples=20, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])


@MANY
@given(shape=shapes(), seed=st.integers(0, 99))
def test_a_model_that_transformers_saved_has_transformers_losses(shape: dict[str, Any], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(shape, Path(folder), seed)
        expected = losses_of_transformers(Path(folder))
        torch.testing.assert_close(own_losses(Path(folder)), expected, rtol=1e-4, atol=1e-4)
        # Packed documents have the losses that each has alone.
        torch.testing.assert_close(packed_losses(Path(folder)), expected, rtol=1e-4, atol=1e-4)


@settings(MANY, max_examples=10)
@given(shape=shapes(), seed=st.integers(0, 99))
def test_an_exported_model_has_its_losses_in_transformers_and_read_back(shape: dict[str, Any], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pretrained, exported = Path(folder) / "in", Path(folder) / "out"
        exported.mkdir()
        save(shape, pretrained, seed)
        text = TextConventions(context_length=TOKENS, end_of_document_id=0, bos_id=None, pad_id=0)
        save_model(loaded(pretrained), exported, text=text)
        expected = own_losses(pretrained)
        torch.testing.assert_close(own_losses(exported), expected, rtol=0, atol=0)
        torch.testing.assert_close(losses_of_transformers(exported), expected, rtol=1e-4, atol=1e-4)
        scaling, again = (read_model_settings(each).rope_scaling for each in (pretrained, exported))
        assert again == scaling


@settings(MANY, max_examples=60)
@given(shape=shapes(), data=st.data())
def test_whatever_is_changed_in_a_folder_the_losses_are_transformers_or_it_is_refused(shape: dict[str, Any], data: Any) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(CONFIG_EDITS)), max_size=3, unique=True))
    changes = {key: data.draw(st.sampled_from(CONFIG_EDITS[key]), key) for key in keys}
    edit = data.draw(st.sampled_from(("", "", *TENSOR_EDITS)))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(shape, directory, seed=2)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))
        weights = directory / "model.safetensors"
        save_file(edited(load_file(weights), edit), weights)
        try:
            found = own_losses(directory)
        except ModelFilesError:
            event("refused")
            return
        try:
            expected = losses_of_transformers(directory)
        except (StrictDataclassError, TypeError):
            event("refused by transformers alone")
            return
        event("loaded")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
