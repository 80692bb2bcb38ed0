"""Meta's multi-token prediction checkpoints compute here what Meta's forward computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.data.loading.batch import targets_and_valid
from pipeline.model.huggingface import ModelFilesError, load_weights, model_files, read_model_settings, weight_problems
from pipeline.model.mtp import MTPModel
from pipeline.saved_model import find_model

ROWS, TOKENS, VOCAB = 2, 12, 37
DIM, LAYERS, HEADS, GROUPS, FUTURE = 24, 6, 6, 2, 4
PARAMS: dict[str, Any] = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": GROUPS,
    "n_future_tokens": FUTURE,
    "vocab_size": -1,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 50.0,
}
FFN = 64  # 2/3 of 4 · 24, rounded up to a multiple of 16.
Weights = dict[str, torch.Tensor]


def weights_of_meta(seed: int = 0) -> Weights:
    """Random weights by Meta's names: LAYERS blocks, of which the last three are extra heads."""
    draw = torch.Generator().manual_seed(seed)
    head = DIM // HEADS
    block = {
        "attention.wq": (DIM, DIM),
        "attention.wk": (GROUPS * head, DIM),
        "attention.wv": (GROUPS * head, DIM),
        "attention.wo": (DIM, DIM),
        "feed_forward.w1": (FFN, DIM),
        "feed_forward.w2": (DIM, FFN),
        "feed_forward.w3": (FFN, DIM),
        "attention_norm": (DIM,),
        "ffn_norm": (DIM,),
    }
    prefixes = [f"layers.{n}" for n in range(LAYERS - FUTURE + 1)] + [f"extra_heads.{n}" for n in range(FUTURE - 1)]
    shapes = {f"{prefix}.{name}.weight": shape for prefix in prefixes for name, shape in block.items()}
    shapes |= {"tok_embeddings.weight": (VOCAB, DIM), "output.weight": (VOCAB, DIM), "norm.weight": (DIM,)}
    weights = {name: torch.randn(shape, generator=draw) * 0.5 for name, shape in shapes.items()}
    return weights | {"rope.freqs": 50.0 ** (-torch.arange(0, head, 2) / head)}


def metas_logits(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Meta's forward with all heads, [B, T, H, V]: rotary positions as complex numbers, then blocks, then norm and output."""
    head = DIM // HEADS
    turns = torch.polar(torch.ones(()), torch.outer(torch.arange(TOKENS).float(), weights["rope.freqs"]))
    future = torch.full((TOKENS, TOKENS), -math.inf).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + PARAMS["norm_eps"]) * weights[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(3)

    def block(x: torch.Tensor, prefix: str) -> torch.Tensor:
        y = norm(x, f"{prefix}.attention_norm")
        q, k, v = (
            (y @ weights[f"{prefix}.attention.{name}.weight"].T).view(ROWS, TOKENS, -1, head) for name in ("wq", "wk", "wv")
        )
        q, k = rotated(q), rotated(k)
        k, v = (each.repeat_interleave(HEADS // GROUPS, dim=2) for each in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(head) + future
        attended = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(2)
        x = x + attended @ weights[f"{prefix}.attention.wo.weight"].T
        y = norm(x, f"{prefix}.ffn_norm")
        gate, up, down = (weights[f"{prefix}.feed_forward.{name}.weight"].T for name in ("w1", "w3", "w2"))
        return x + (F.silu(y @ gate) * (y @ up)) @ down

    x = weights["tok_embeddings.weight"][tokens]
    last = LAYERS - FUTURE
    for layer in range(last):
        x = block(x, f"layers.{layer}")
    prefixes = [f"layers.{last}", *(f"extra_heads.{n}" for n in range(FUTURE - 1))]
    hidden = torch.stack([block(x, prefix) for prefix in prefixes], dim=2)
    return norm(hidden, "norm") @ weights["output.weight"].T


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    save_file(weights_of_meta(), tmp_path / "consolidated.safetensors")
    return tmp_path


def test_a_checkpoint_of_metas_has_metas_losses_for_every_head(folder: Path) -> None:
    tokens = torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(ROWS, TOKENS, dtype=torch.int32)
    targets, valid = targets_and_valid(tokens, documents, FUTURE)
    logits = metas_logits(weights_of_meta(), tokens)
    expected = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(valid.shape) * valid

    settings = read_model_settings(folder)
    assert (settings.num_layers, settings.num_prediction_heads, settings.ffn_dim) == (LAYERS - FUTURE + 1, FUTURE, FFN)
    policy = MTPModel(settings)
    assert load_weights(policy, folder) == []
    with torch.no_grad():
        found = policy(tokens, documents, targets, valid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    # As the other commands read it.
    saved = find_model(folder).build(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert torch.equal(saved(tokens, documents, targets, valid), found)
    assert [file.name for file in model_files(folder)] == ["consolidated.safetensors", "params.json"]


def test_a_model_with_fewer_heads_takes_those_that_it_has(folder: Path) -> None:
    shape = read_model_settings(folder).model_copy(update={"num_prediction_heads": 2})
    assert weight_problems(shape, folder) == []
    policy = MTPModel(shape)
    load_weights(policy, folder)
    assert torch.equal(policy.heads[1].ffn.up.weight, weights_of_meta()["extra_heads.0.feed_forward.w3.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 7}, "n_layers is 7 in params.json, the files have 6"),
        ({"n_future_tokens": 3}, "n_future_tokens is 3 in params.json, the files have 4"),
        ({"n_future_tokens": 9}, "num_layers: got -2"),
        ({"multiple_of": 32, "ffn_dim_multiplier": 2.0}, "'layers.0.feed_forward.w1.weight' is [64, 24], expected [128, 24]"),
        ({"use_scaled_rope": True}, "use_scaled_rope is true in params.json"),
        ({"qk_norm": True}, "qk_norm: unknown, it may name what is not computed here"),
        ({"dim": "24"}, "dim: got '24'; expected a whole number"),
        ({"dim": None}, "dim: got None"),
        ({"n_kv_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
    ],
)
def test_params_that_do_not_fit_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))
    with pytest.raises(ModelFilesError) as caught:
        load_weights(MTPModel(read_model_settings(folder)), folder)
    assert message in str(caught.value)


def test_a_pickle_alone_is_refused_with_the_way_to_convert_it(folder: Path) -> None:
    (folder / "consolidated.safetensors").rename(folder / "consolidated.pth")
    with pytest.raises(
        ModelFilesError, match=r"consolidated.pth is a pickle, which is never executed: convert it as the README"
    ):
        read_model_settings(folder)


def test_the_lines_of_the_readme_convert_a_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of_meta()
    torch.save(weights, folder / "consolidated.pth")
    (folder / "consolidated.safetensors").unlink()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = (each for each in readme.split("```python\n")[1:] if "consolidated.pth" in each)
    monkeypatch.chdir(folder)
    exec(lines.partition("```")[0])
    assert "weights_only=True" in lines
    found = load_file(folder / "consolidated.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
