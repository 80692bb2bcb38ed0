"""Models as files: what is written is read back, what does not fit is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.model import export
from pipeline.model.export import save_model
from pipeline.model.huggingface import ModelFilesError, load_weights, read_model_settings, weight_problems
from pipeline.model.mtp import MTPModel, initialize_weights
from tests.unit.test_model import initialized, rows, small


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": True}, {"attention_bias": True}, {"qk_norm": True, "num_key_value_heads": 2}],
    ids=["llama", "tied", "qwen2", "qwen3"],
)
def test_a_saved_model_is_read_back_exactly(tmp_path, changes) -> None:
    model = initialized(small(**changes))
    save_model(model, tmp_path)
    settings = read_model_settings(tmp_path)
    again = MTPModel(settings)
    load_weights(again, tmp_path)
    assert settings.num_prediction_heads == 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_large_model_is_written_in_several_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 4000)
    model = initialized(small())
    save_model(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 2
    assert set(index.values()) == set(files)
    again = MTPModel(read_model_settings(tmp_path))
    load_weights(again, tmp_path)
    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in model.named_parameters())


def test_trunk_and_head_0_carry_the_names_of_an_ordinary_llama(tmp_path) -> None:
    save_model(initialized(small(num_prediction_heads=1)), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    block = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    block += ["mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in block}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["num_hidden_layers"]) == ("llama", ["LlamaForCausalLM"], 2)


def test_heads_that_the_files_lack_start_as_copies_of_the_last_block(tmp_path) -> None:
    pretrained = initialized(small(num_prediction_heads=1))
    save_model(pretrained, tmp_path)
    policy = MTPModel(small())
    load_weights(policy, tmp_path)
    tokens, documents = rows()
    with torch.no_grad():
        expected = pretrained.hidden_states(tokens, documents)
        found = policy.hidden_states(tokens, documents)
    assert all(torch.equal(found[:, :, h], expected[:, :, 0]) for h in range(4))


def test_heads_that_the_files_lack_may_start_fresh_as_those_of_an_untrained_model(tmp_path) -> None:
    pretrained = initialized(small(num_prediction_heads=2, seed=5))
    save_model(pretrained, tmp_path)
    policy, fresh = MTPModel(small(new_heads="fresh")), MTPModel(small())
    initialize_weights(fresh)
    assert load_weights(policy, tmp_path) == []
    for name, parameter in policy.named_parameters():
        # Head 1 is in the files.
        expected = (fresh if name.startswith(("heads.2", "heads.3")) else pretrained).get_parameter(name)
        assert torch.equal(parameter, expected), name


def test_what_cannot_be_computed_exactly_is_refused(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "model_type 'gpt2'; expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "olmo2"}, "model_type 'olmo2'; expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "smollm3"}, "model_type 'smollm3'; expected one of"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rotary positions .*longrope.* are not supported; expected one rope_type",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.linear.factor: got .*Field required"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor: got '4'; expected a number"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for all layers"),
        ({"model_type": "qwen2", "architectures": None, "mlp_bias": True}, "mlp_bias is true .*qwen2 has no use for"),
        ({"model_type": "mistral", "architectures": None, "attention_bias": True}, "attention_bias is true .*mistral has no"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*; use the weights before they were quan"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
        ({"layer_types": ["full_attention"]}, "only 'full_attention' for every layer"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is \['LlamaForSequenceClassification'\]"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map in config.json names code of the folder's own"),
        ({"num_hidden_layers": 0}, "makes no sense: num_layers: got 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelFilesError, match=message):
            read_model_settings(tmp_path)


WRONG_VALUES = [
    *[
        ({key: value}, f"{key}: got")
        for key in ("hidden_size", "num_hidden_layers", "vocab_size")
        for value in ("16", 16.0, True, [])
    ],
    ({"num_key_value_heads": "2"}, "num_key_value_heads: got '2'; expected a whole number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: got 'false'; expected true or false"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: got '1e-5'; expected a number"),
    ({"rope_theta": "10000"}, "rope_theta: got '10000'"),
    ({"rope_theta": float("nan")}, "rope_theta: got nan"),
    ({"rope_scaling": "linear"}, "rope_scaling: got 'linear'; expected an object"),
    ({"rope_parameters": [1]}, r"rope_parameters: got \[1\]"),
    ({"rope_parameters": {"rope_theta": "5e5"}}, "rope_theta: got '5e5'"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rotary positions .* are not supported"),
    ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ({"architectures": "LlamaForCausalLM"}, "architectures: got 'LlamaForCausalLM'; expected a list"),
    ({"num_attention_heads": 3, "head_dim": None}, "hidden_size 16 is no multiple of num_attention_heads 3"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ({"head_dim": 3}, "odd width 3"),
    ({"num_hidden_layers": 0}, "num_layers: got 0"),
    *[({key: None}, f"lacks '{key}'") for key in ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps")],
    *[({key: 10**18}, f"got {10**18}") for key in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size")],
]


@pytest.mark.parametrize(("change", "message"), WRONG_VALUES, ids=[f"{change}"[1:-1] for change, _ in WRONG_VALUES])
def test_values_of_a_wrong_type_or_size_are_named(tmp_path, change, message) -> None:
    save_model(initialized(small()), tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(ModelFilesError, match=message):
        read_model_settings(tmp_path)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by name, or remove them."""
    tensors = load_file(directory / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "default", "rope_theta": 3e5}}, 3e5),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": {}}, 7.0),
    ],
)
def test_rotary_parameters_that_disagree_are_taken_in_the_order_of_transformers_5(tmp_path, keys, expected) -> None:
    save_model(initialized(small()), tmp_path)
    change_config(tmp_path, **keys)
    assert read_model_settings(tmp_path).rope_theta == expected


LAYER = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.q_proj.bias": torch.zeros(16)}, f"'{LAYER}.q_proj.bias' has no place in the model"),
        ({f"{LAYER}.q_norm.weight": torch.ones(4)}, f"'{LAYER}.q_norm.weight' has no place"),
        ({"score.weight": torch.zeros(2, 16)}, "'score.weight' has no place"),
        ({f"{LAYER}.q_proj.weight_scale_inv": torch.ones(1, 1)}, "weight_scale_inv' has no place"),
        (
            {f"{LAYER}.q_proj.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)},
            "q_proj.weight' is F8_E4M3, expected one of F64",
        ),
        ({f"{LAYER}.q_proj.weight": torch.ones(16, 16, dtype=torch.int8)}, "q_proj.weight' is I8, expected"),
        ({"lm_head.weight": None}, "no tensor 'lm_head.weight'"),
        ({"model.layers.2.input_layernorm.weight": torch.ones(16)}, "num_hidden_layers is 2 in config.json, the files have 3"),
        (
            {"prediction_heads.4.input_layernorm.weight": torch.ones(16)},
            "num_prediction_heads is 4 in config.json, the files have 5",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_would_be_ignored_misread_or_made_up_is_named(tmp_path, tensors, message) -> None:
    save_model(initialized(small()), tmp_path)
    change_tensors(tmp_path, **tensors)
    with pytest.raises(ModelFilesError, match=message):
        load_weights(MTPModel(small()), tmp_path)


def test_what_older_saves_kept_of_the_rotary_positions_may_lie_there(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    change_tensors(tmp_path, **{f"{LAYER}.rotary_emb.inv_freq": torch.ones(2)})
    assert load_weights(MTPModel(small()), tmp_path) == []


def test_more_layers_than_could_be_built_are_refused_at_once(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    change_config(tmp_path, num_hidden_layers=10**6)
    assert weight_problems(read_model_settings(tmp_path), tmp_path)[0].endswith(
        "num_hidden_layers is 1000000 in config.json, the files have 2"
    )


def test_an_unembedding_of_its_own_in_a_tied_model_must_equal_the_embedding(tmp_path) -> None:
    save_model(initialized(small(tied_embeddings=True)), tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, **{"lm_head.weight": embedding.clone()})
    load_weights(MTPModel(small(tied_embeddings=True)), tmp_path)

    change_tensors(tmp_path, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ModelFilesError, match=r"tie_word_embeddings is true .* 'lm_head.weight' differs from 'model.embed_to"):
        load_weights(MTPModel(small(tied_embeddings=True)), tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    model = MTPModel(read_model_settings(tmp_path))
    load_weights(model, tmp_path)
    assert torch.equal(model.unembed.weight, embedding + 1)


def test_values_that_are_not_finite_are_returned_by_their_tensors_names(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    down, norm = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    weights[down][3, 5], weights[norm][1] = torch.nan, -torch.inf
    save_file(weights, tmp_path / "model.safetensors")
    assert load_weights(MTPModel(small()), tmp_path) == [down, norm]


def saved_in_several_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A saved model of several files; returns the content of its index."""
    monkeypatch.setattr(export, "SHARD_BYTES", 4000)
    save_model(initialized(small()), directory)
    return json.loads((directory / "model.safetensors.index.json").read_text())


FIRST_FILE = "model-00001-of-00005.safetensors"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model-00001.safetensors", "lies in '../model-00001.safetensors'; expected the name of a .safetensors file in"),
        ("/etc/model.safetensors", "lies in '/etc/model.safetensors'"),
        ("..", "lies in '..'"),
        (7, "lies in 7; expected"),
        (None, "lies in None; expected"),
        (FIRST_FILE, f"{FIRST_FILE} lacks 'model.embed_tokens.weight', other than .*index.json says"),
    ],
)
def test_an_index_that_leads_astray_is_refused(tmp_path, monkeypatch, file, message) -> None:
    index = saved_in_several_files(tmp_path, monkeypatch)
    last = sorted(set(index["weight_map"].values()))[-1]
    moved = next(name for name, where in index["weight_map"].items() if where == last)
    index["weight_map"][moved] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFilesError, match=message.replace("model.embed_tokens.weight", moved)):
        read_model_settings(tmp_path)


def test_a_tensor_that_the_index_does_not_give_to_a_file_is_refused(tmp_path, monkeypatch) -> None:
    """As files that another save left to share: the loader would take whichever copy comes last."""
    index = saved_in_several_files(tmp_path, monkeypatch)
    file = tmp_path / index["weight_map"]["model.norm.weight"]
    save_file(load_file(file) | {"model.embed_tokens.weight": torch.ones(29, 16)}, file)
    with pytest.raises(ModelFilesError, match=rf"{file.name} has 'model.embed_tokens.weight', other than .*index.json says"):
        read_model_settings(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path, monkeypatch) -> None:
    saved_in_several_files(tmp_path, monkeypatch)
    for content in ({}, {"weight_map": []}, {"weight_map": {}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(ModelFilesError, match="expected 'weight_map'"):
            read_model_settings(tmp_path)


def test_a_single_file_beside_the_index_of_another_save_is_refused(tmp_path, monkeypatch) -> None:
    saved_in_several_files(tmp_path, monkeypatch)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelFilesError, match=r"holds model.safetensors and model.safetensors.index.json, which names other files"
    ):
        read_model_settings(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"adapter_config.json says that the folder holds an adapter on top"):
        read_model_settings(tmp_path)


def test_a_configuration_that_is_no_object_is_refused(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFilesError, match="expected a JSON object"):
        read_model_settings(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(ModelFilesError, match="no such directory"):
        read_model_settings(tmp_path / "absent")
    with pytest.raises(ModelFilesError, match=r"missing config.json, model.safetensors"):
        read_model_settings(tmp_path)
    save_model(initialized(small()), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelFilesError, match="not a safetensors file"):
        read_model_settings(tmp_path)


def test_a_missing_tensor_is_named_before_anything_is_loaded(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    model = MTPModel(small())
    before = model.embed.weight.clone()
    with pytest.raises(ModelFilesError, match=r"no tensor 'model.norm.weight' for the model's 'unembed.norm.weight'"):
        load_weights(model, tmp_path)
    assert torch.equal(model.embed.weight, before)


def test_a_tensor_of_another_shape_is_named(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    with pytest.raises(ModelFilesError, match=r"'model.embed_tokens.weight' is \[29, 16\], expected \[30, 16\]"):
        load_weights(MTPModel(small(vocab_size=30)), tmp_path)
