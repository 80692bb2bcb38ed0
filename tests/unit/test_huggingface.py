"""Models as files: what is written is read back, what does not fit is refused by name."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pipeline.model.huggingface as huggingface
from pipeline.model.huggingface import ModelFilesError, load_weights, read_model_settings, save_model
from pipeline.model.mtp import MTPModel
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
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 4000)
    model = initialized(small())
    save_model(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
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


def test_what_cannot_be_computed_exactly_is_refused(tmp_path) -> None:
    save_model(initialized(small()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "model_type 'gpt2'; expected one of llama, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "scaled rotary positions"),
        ({"rope_scaling": "linear"}, "scaled rotary positions"),
        ({"mlp_bias": True}, "mlp_bias is True in config.json; only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": "wide"}, "makes no sense: dim: got 'wide'"),
        ({"num_hidden_layers": 0}, "makes no sense: num_layers: got 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelFilesError, match=message):
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
