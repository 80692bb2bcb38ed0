"""A drafter drafts what head 1 drafts, in the form that each serving engine documents, or the model is refused by name."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from launch.export import main
from pipeline.data.shards.manifest import read_manifest
from pipeline.generation.decoding import decode
from pipeline.model.mtp import MTPModel
from pipeline.saved_model import ModelFilesError, find_model
from tests.saved_models import model_of, write_checkpoint

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "head_dim": 10},
    "tied": {"tied_embeddings": True},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}


def run_of(folder: Path, tiny_data: Path, num_layers: int = 5, **changes: Any) -> tuple[Path, MTPModel]:
    model = model_of(read_manifest(tiny_data / "train").vocab_size, seed=7, num_layers=num_layers, **changes)
    write_checkpoint(folder, model, 6, tiny_data / "train", ranks=2)
    return folder, model


def export_drafter(run: Path, directory: Path, engine: str) -> dict[str, Any]:
    """The drafter's configuration."""
    assert main([str(run), str(directory), "--drafter", "eagle3", "--engine", engine, "--dtype", "float32"]) == 0
    return json.loads((directory / "config.json").read_text())


def states_and_logits(model: MTPModel, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """(the input of each layer of the next-token path, and head 1's logits) of one document [T]."""
    documents = torch.zeros(1, len(tokens), dtype=torch.int32)
    states: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, given: states.append(given[0][0])) for block in (*model.trunk, model.heads[0])
    ]
    head_TD = model.hidden_states(tokens[None], documents)[0, :, 1]
    for hook in hooks:
        hook.remove()
    return states, F.linear(model.unembed.norm(head_TD), model.unembed.weight)


def eagle3(layer: dict[str, Any], tensors: dict[str, Tensor], prefix: str, embeds_TD: Tensor, states_TE: Tensor) -> Tensor:
    """The forward of an EAGLE-3 drafter of one layer as its paper and the engines have it; logits [T, V]."""
    num_tokens, heads, groups = len(embeds_TD), layer["num_attention_heads"], layer["num_key_value_heads"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], tensors[name], layer["rms_norm_eps"])

    def project(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{prefix}.{name}.weight"], tensors.get(f"{prefix}.{name}.bias"))

    hidden_TD = states_TE @ tensors["fc.weight"].T
    both = torch.cat([norm(f"{prefix}.input_layernorm.weight", embeds_TD), norm(f"{prefix}.hidden_norm.weight", hidden_TD)], 1)
    query, key, value = (project(f"self_attn.{each}_proj", both).unflatten(1, (-1, layer["head_dim"])) for each in "qkv")
    if f"{prefix}.self_attn.q_norm.weight" in tensors:
        query, key = norm(f"{prefix}.self_attn.q_norm.weight", query), norm(f"{prefix}.self_attn.k_norm.weight", key)
    half = torch.arange(0, layer["head_dim"], 2) / layer["head_dim"]
    angles = torch.outer(torch.arange(num_tokens).float(), layer["rope_theta"] ** -half).repeat(1, 2)[:, None]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    query, key = rotated(query), rotated(key).repeat_interleave(heads // groups, dim=1)
    scores = torch.einsum("tnk,snk->nts", query, key) / layer["head_dim"] ** 0.5
    causal = torch.ones(num_tokens, num_tokens).tril().bool()
    shares = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    attended = torch.einsum("nts,snk->tnk", shares, value.repeat_interleave(heads // groups, dim=1))
    hidden_TD = hidden_TD + project("self_attn.o_proj", attended.flatten(1))
    normed = norm(f"{prefix}.post_attention_layernorm.weight", hidden_TD)
    hidden_TD = hidden_TD + project("mlp.down_proj", F.silu(project("mlp.gate_proj", normed)) * project("mlp.up_proj", normed))
    return norm("norm.weight", hidden_TD) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize(
    ("family", "engine"), [(family, "vllm") for family in FAMILIES] + [("llama", "sglang"), ("tied", "sglang")]
)
def test_an_eagle_3_layer_with_the_drafters_weights_has_the_logits_of_head_1(tmp_path, tiny_data, family, engine) -> None:
    run, model = run_of(tmp_path / "run", tiny_data, **FAMILIES[family])
    config = export_drafter(run, tmp_path / "out", engine)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tokens = torch.randint(model.settings.vocab_size, (12,), generator=torch.Generator().manual_seed(3))
    states, expected = states_and_logits(model, tokens)

    # SGLang numbers the outputs of layers, vLLM their inputs.
    layer = config if engine == "sglang" else config["transformer_layer_config"]
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] if engine == "sglang" else None
    inputs = [each + 1 for each in ids] if ids else config["eagle_aux_hidden_state_layer_ids"]
    states_TE = torch.cat([states[each] for each in inputs], dim=1)
    embeds_TD = model.embed.weight[tokens.roll(-1)]
    prefix = "midlayer" if engine == "sglang" else "layers.0"
    found = eagle3(layer, tensors, prefix, embeds_TD, states_TE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_layers", [4, 5, 9])
def test_states_ascend_are_different_and_end_with_the_trunks_output(tmp_path, tiny_data, num_layers) -> None:
    run, _ = run_of(tmp_path / "run", tiny_data, num_layers)
    ids = export_drafter(run, tmp_path / "vllm", "vllm")["eagle_aux_hidden_state_layer_ids"]
    assert ids == sorted(set(ids))
    assert 1 <= ids[0] < ids[-1] == num_layers - 1
    assert len(ids) == 3
    of_sglang = export_drafter(run, tmp_path / "sglang", "sglang")["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert of_sglang == [each - 1 for each in ids]
    # Some of SGLang's models take the numbers for inputs of layers unless the first is 1 (sgl-project/sglang 25454).
    assert num_layers == 4 or of_sglang[0] == 1


def test_the_fields_are_those_that_the_engines_read(tmp_path, tiny_data) -> None:
    run, model = run_of(tmp_path / "run", tiny_data)
    config = export_drafter(run, tmp_path / "vllm", "vllm")
    expected = {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": model.settings.vocab_size,
        "norm_before_residual": False,
    }
    assert {key: config[key] for key in expected} == expected
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert (proposal["proposal_type"], proposal["speculative_tokens"]) == ("greedy", 1)
    layer = {key: config["transformer_layer_config"][key] for key in ("model_type", "num_hidden_layers", "vocab_size")}
    assert layer == {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": model.settings.vocab_size}

    # The verifier's path is relative, so a moved folder stays whole; it is an ordinary export, and the drafter none.
    verifier = config["speculators_config"]["verifier"]["name_or_path"]
    (tmp_path / "vllm").rename(tmp_path / "moved")
    assert find_model(tmp_path / "moved" / verifier).settings.num_prediction_heads == 4
    with pytest.raises(ModelFilesError, match=r"moved: is a drafter for a serving engine; name the model .*moved/verifier"):
        find_model(tmp_path / "moved")
    assert "num_speculative_tokens" in (tmp_path / "moved" / "README.md").read_text()

    config = export_drafter(run, tmp_path / "sglang", "sglang")
    expected = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
    expected |= {"draft_vocab_size": model.settings.vocab_size, "tie_word_embeddings": False}
    assert {key: config[key] for key in expected} == expected
    assert "--speculative-algorithm EAGLE3" in (tmp_path / "sglang" / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_what_reads_speculators_format_finds_the_embedding_and_does_not_make_one_of_its_own(tmp_path, tiny_data, tied) -> None:
    run, model = run_of(tmp_path / "run", tiny_data, tied_embeddings=tied)
    for engine, its_own in (("vllm", True), ("sglang", False)):
        export_drafter(run, tmp_path / engine, engine)
        tensors = load_file(tmp_path / engine / "model.safetensors")
        assert ("embed_tokens.weight" in tensors) is its_own
        assert torch.equal(tensors.get("embed_tokens.weight", model.embed.weight), model.embed.weight)
        assert torch.equal(tensors["lm_head.weight"], model.unembed.weight)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"num_layers": 3}, ["vllm"], "the model has 3 layers; .* expected at least 4"),
        ({"num_prediction_heads": 1}, ["vllm"], "the model has head 0 alone, and no head that could draft"),
        ({"qk_norm": True}, ["sglang"], "has the form of qwen3, .*; use --engine vllm"),
        ({"attention_bias": True}, ["sglang"], "has the form of qwen2, .*; use --engine vllm"),
        ({}, [], "--drafter and --engine belong together; add --engine vllm or --engine sglang"),
    ],
)
def test_a_model_without_such_a_drafter_is_refused_and_nothing_is_left(
    tmp_path, tiny_data, capsys, changes, options, message
) -> None:
    run, _ = run_of(tmp_path / "run", tiny_data, **{"num_layers": 4, **changes})
    engine = ["--engine", *options] if options else []
    assert main([str(run), str(tmp_path / "out"), "--drafter", "eagle3", *engine]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
}


def test_a_drafter_needs_room_beside_the_model(tmp_path, tiny_data, monkeypatch, capsys) -> None:
    run, _ = run_of(tmp_path / "run", tiny_data)
    export_drafter(run, tmp_path / "first", "vllm")
    files = sorted((tmp_path / "first").rglob("*.safetensors"))
    needed = sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    second = [str(run), str(tmp_path / "second"), "--dtype", "float32"]
    assert main([*second, "--drafter", "eagle3", "--engine", "vllm"]) != 0
    assert f"{needed:,} bytes are needed, and {needed - 1:,} are free" in capsys.readouterr().err
    assert main(second) == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_speculators_drafts_as_head_1_from_the_states_of_transformers_and_accepts_as_often(
    tmp_path, tiny_data, monkeypatch, family
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    eagle3_models = pytest.importorskip("speculators.models.eagle3")
    transformers.utils.logging.disable_progress_bar()
    changes = {"rope_scaling": SCALED[family]} if family in SCALED else FAMILIES[family]
    run, model = run_of(tmp_path / "run", tiny_data, **changes)
    export_drafter(run, tmp_path / "out", "vllm")

    # The verifier's path counts from the drafter's folder.
    monkeypatch.chdir(tmp_path / "out")
    drafter = eagle3_models.Eagle3DraftModel.from_pretrained(".").eval()
    verifier = transformers.AutoModelForCausalLM.from_pretrained(drafter.config.speculators_config.verifier.name_or_path)
    assert torch.equal(drafter.embed_tokens.weight, verifier.get_input_embeddings().weight)
    prompt = [5, 6, 7]
    (completion,), counts = decode(model, [prompt], [12], num_drafts=1)
    tokens = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        hidden = verifier(tokens, output_hidden_states=True).hidden_states
        states = torch.cat([hidden[each] for each in drafter.config.eagle_aux_hidden_state_layer_ids], dim=-1)
        logits = logits_of(drafter, states, tokens)
    _, expected = states_and_logits(model, tokens[0])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    # Greedy decoding by drafts of speculators: a step adds the draft, if it is the text, and the token after it.
    drafts, text, place, steps = logits.argmax(-1), tokens[0], len(prompt), 0
    while place < len(text) - 1:
        steps, place = steps + 1, place + 1 + int(drafts[place - 1] == text[place + 1])
    assert steps == counts.steps


def logits_of(drafter: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """The logits of one whole forward of a drafter of speculators, [T, V]."""
    logits: list[Tensor] = []
    hook = drafter.lm_head.register_forward_hook(lambda _, __, result: logits.append(result))
    documents = torch.zeros_like(tokens)
    drafter(states, tokens.roll(-1, dims=1), documents, ttt_steps=1)
    hook.remove()
    return logits[0][0]
