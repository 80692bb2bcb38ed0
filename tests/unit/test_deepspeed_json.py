"""The DeepSpeed JSON: ZeRO, precision and communication and nothing else; 'auto' resolved or refused, never passed on."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from pipeline.recipe import load_settings
from pipeline.runtime.deepspeed_json import read_deepspeed_json, resolve_deepspeed_json, with_nodes_of

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
OWNED_BY_THE_RECIPE = [
    ("train_batch_size", 16, "data.global_batch", 8),
    ("train_micro_batch_size_per_gpu", 16, "data.micro_batch", 4),
    ("gradient_accumulation_steps", 16, "data.global_batch", 8),
    ("gradient_clipping", 0.5, "training.gradient_clipping", 1.0),
    ("optimizer", {"type": "Adam"}, "training.learning_rate", 0.0003),
    ("scheduler", {"type": "WarmupLR"}, "training.schedule", "cosine"),
]


@pytest.fixture(scope="module")
def settings():
    overrides = ["data.path=x", "reference.path=y", "data.global_batch=8", "data.micro_batch=4", "model.dim=64"]
    return load_settings(None, overrides)


@pytest.fixture
def problems_of(tmp_path, settings):
    def problems(content):
        if isinstance(content, dict):
            zero = content.get("zero_optimization", {})
            content = content | {"zero_optimization": {"stage": 3} | zero if isinstance(zero, dict) else zero}
        path = tmp_path / "deepspeed.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read_deepspeed_json(path, settings)[1]

    return problems


def all_values(content):
    if isinstance(content, dict):
        return [value for child in content.values() for value in all_values(child)]
    return [content]


def test_there_is_a_json_to_ship():
    assert [path.name for path in SHIPPED] == ["zero1.json", "zero2.json", "zero3.json", "zero3_hpz.json", "zero3_offload.json"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_shipped_json_is_accepted_and_becomes_what_deepspeed_accepts(path, world_size, settings):
    content, problems = read_deepspeed_json(path, settings)
    assert problems == []
    resolved = resolve_deepspeed_json(content, settings, world_size)
    assert "auto" not in all_values(resolved)
    # Without a process group DeepSpeed takes one rank, so the accumulation it works out is that of one rank.
    config = DeepSpeedConfig({key: value for key, value in resolved.items() if key != "gradient_accumulation_steps"})
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (8, 4)
    assert config.gradient_clipping == 1.0
    assert config.zero_config.stage == content["zero_optimization"]["stage"]
    assert resolved["gradient_accumulation_steps"] == 2 // world_size


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_json_reduces_gradients_in_float32(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["communication_data_type"] == "fp32"
    assert content["data_types"] == {"grad_accum_dtype": "fp32"}


def test_auto_becomes_the_recipes_sizes(settings):
    content = {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    }
    resolved = resolve_deepspeed_json(content, settings, 1)
    assert resolved["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 2**22,
        # A block without what is below the threshold: 4 D² + 3 D F, D = 64, F = 192.
        "stage3_prefetch_bucket_size": 4 * 64**2 + 3 * 64 * 192,
        "stage3_param_persistence_threshold": 640,
    }
    assert content["zero_optimization"]["reduce_bucket_size"] == "auto"  # what was read stays as it is


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens on a CPU")
def test_bf16_auto_is_off_on_a_cpu(settings):
    assert resolve_deepspeed_json({"bf16": {"enabled": "auto"}}, settings, 1)["bf16"] == {"enabled": False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_auto_is_on_where_the_accelerator_has_it(settings):
    expected = torch.cuda.get_device_capability()[0] >= 8
    assert resolve_deepspeed_json({"bf16": {"enabled": "auto"}}, settings, 1)["bf16"] == {"enabled": expected}


def test_no_clipping_is_zero_to_deepspeed(settings):
    unclipped = settings.with_values(training={"gradient_clipping": None})
    assert resolve_deepspeed_json({}, unclipped, 1)["gradient_clipping"] == 0.0
    assert resolve_deepspeed_json({}, settings, 1)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(("key", "there", "owner", "here"), OWNED_BY_THE_RECIPE)
def test_a_number_that_the_recipe_owns_is_refused_with_both_values(problems_of, key, there, owner, here):
    assert problems_of({key: there}) == [
        f"deepspeed {key}: {there!r} there, {owner} = {here!r} in the recipe; the recipe owns it: remove the key or set it to "
        "'auto'"
    ]


@pytest.mark.parametrize(("key", "there", "owner", "here"), OWNED_BY_THE_RECIPE)
def test_a_number_that_the_recipe_owns_may_be_auto(problems_of, settings, key, there, owner, here):
    assert problems_of({key: "auto"}) == []
    resolved = resolve_deepspeed_json({key: "auto"}, settings, 2)
    assert "auto" not in all_values(resolved)
    assert resolved == resolve_deepspeed_json({}, settings, 2)


def test_an_equal_batch_size_in_both_files_is_refused_too(problems_of):
    (problem,) = problems_of({"train_batch_size": 8})
    assert "8 there, data.global_batch = 8 in the recipe" in problem


@pytest.mark.parametrize(
    ("content", "beginning", "end"),
    [
        ({"zero_optimisation": {}}, "deepspeed zero_optimisation: unknown key", "did you mean 'zero_optimization'?"),
        ({"bfloat16": {}}, "deepspeed bfloat16: unknown key", "did you mean 'bf16'?"),
        ({"seed": 3}, "deepspeed seed: unknown key, or not ZeRO, precision or communication", ""),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            "deepspeed zero_optimization.overlap_com: unknown key",
            "did you mean 'overlap_comm'?",
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_sise": 1}},
            "deepspeed zero_optimization.stage3_prefetch_bucket_sise: unknown key",
            "did you mean 'stage3_prefetch_bucket_size'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(problems_of, content, beginning, end):
    (problem,) = problems_of(content)
    assert problem.startswith(beginning)
    assert problem.endswith(end)


def test_both_names_that_deepspeed_gives_a_key_are_known(problems_of):
    for key in ("stage3_prefetch_bucket_size", "prefetch_bucket_size", "stage3_gather_16bit_weights_on_model_save"):
        assert problems_of({"zero_optimization": {"stage": 3, key: 1}}) == []


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"overlap_comm": "auto"}}, "zero_optimization.overlap_comm"),
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"comms_logger": {"enabled": "auto"}}, "comms_logger.enabled"),
        ({"bf16": "auto"}, "bf16"),
        ({"data_types": {"grad_accum_dtype": "auto"}}, "data_types.grad_accum_dtype"),
    ],
)
def test_an_auto_that_nothing_resolves_is_refused(problems_of, content, place):
    assert problems_of(content) == [f"deepspeed {place}: 'auto' is not resolved here; write a value or leave the key out"]


@pytest.mark.parametrize("value", [{}, {"enabled": True}, {"loss_scale": 0}, True])
def test_fp16_is_refused_with_the_reason(problems_of, value):
    (problem,) = problems_of({"fp16": value})
    assert problem.startswith("deepspeed fp16: train in bf16 or float32")


def test_deepcompile_is_refused_with_the_setting_that_compiles(problems_of):
    (problem,) = problems_of({"compile": {"deepcompile": True}})
    assert problem.startswith("deepspeed compile: DeepCompile compiles a whole model")
    assert "training.compile" in problem


def test_fp16_that_is_off_is_accepted(problems_of):
    assert problems_of({"fp16": {"enabled": False}}) == []


def test_everything_that_is_wrong_with_the_file_is_said_at_once(problems_of):
    problems = problems_of({"fp16": {}, "train_batch_size": 3, "zero_optimization": {"stag": 3}, "bf17": {}})
    assert [problem.split(":")[0] for problem in problems] == [
        "deepspeed fp16",
        "deepspeed train_batch_size",
        "deepspeed bf17",
        "deepspeed zero_optimization.stag",
    ]


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not valid JSON"), ("[1]", "expected a JSON object"), ("", "not valid JSON")]
)
def test_a_file_that_is_not_an_object_is_refused_and_named(problems_of, tmp_path, text, said):
    (problem,) = problems_of(text)
    assert problem.startswith(f"--deepspeed: {tmp_path / 'deepspeed.json'}")
    assert said in problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "deepspeed zero_optimization.stage: got 0; expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 7}}, "deepspeed zero_optimization.stage: got 7"),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "deepspeed zero_optimization.compute_grad_norm: only by the norm",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "deepspeed zero_optimization.offload_optimizer.device: got 'nvme'; expected 'cpu'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "deepspeed zero_optimization.offload_param: needs stage 3",
        ),
        ({"bf16": {"check_grad_overflow": False}}, "deepspeed bf16.check_grad_overflow: a gradient that is not finite"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "deepspeed zero_optimization.zero_quantized_weights: rounds what ranks exchange",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "deepspeed zero_optimization.cpu_offload: DeepSpeed's former spelling"),
        ({"comms_logger": {"enabledd": True}}, "deepspeed comms_logger.enabledd: unknown key; did you mean 'enabled'?"),
        ({"comms_logger": "x"}, "deepspeed comms_logger: got 'x'; expected an object"),
        ({"flops_profiler": {"enabled": True}}, "deepspeed flops_profiler: unknown key, or not ZeRO, precision or"),
        ({"bf16": {"enabeld": True}}, "deepspeed bf16.enabeld: unknown key; did you mean 'enabled'?"),
        ({"communication_data_type": "float32"}, "deepspeed communication_data_type: got 'float32'; expected one of fp32"),
        ({"data_types": {"grad_dtype": "fp32"}}, "deepspeed data_types.grad_dtype: unknown key"),
        ({"data_types": 3}, "deepspeed data_types: got 3; expected an object"),
    ],
)
def test_a_value_that_deepspeed_or_this_project_cannot_honour_is_refused(problems_of, content, said):
    assert any(problem.startswith(said) for problem in problems_of(content))


def test_a_key_that_comes_twice_is_refused(problems_of):
    (problem,) = problems_of('{"zero_optimization": {"stage": 3, "stage": 2}}')
    assert problem.endswith("is not valid JSON: 'stage' given twice")


def test_gradients_are_reduced_in_float32_where_the_file_is_silent(settings):
    resolved = resolve_deepspeed_json({"zero_optimization": {"stage": 3}}, settings, 1)
    assert (resolved["communication_data_type"], resolved["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})


def test_a_section_that_should_be_an_object_is_refused(problems_of):
    (problem,) = problems_of({"zero_optimization": 3})
    assert problem.startswith("deepspeed zero_optimization: got 3; expected an object")


def test_a_missing_file_is_refused_and_named(tmp_path, settings):
    path = tmp_path / "none.json"
    assert read_deepspeed_json(path, settings) == ({}, [f"--deepspeed: no such file: {path}"])


@pytest.mark.parametrize(
    ("ranks", "of_a_node", "expected"), [(4, 2, 2), (16, 8, 8), (16, 4, 4), (2, 2, 1), (6, 4, 1), (6, 1, 1), (16, None, 8)]
)
def test_hpz_partitions_the_weights_once_more_over_the_ranks_of_a_node(
    settings, ranks: int, of_a_node: int | None, expected: int
) -> None:
    content = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text(encoding="utf-8"))
    told = content if of_a_node is None else with_nodes_of(content, of_a_node, ranks)
    assert resolve_deepspeed_json(told, settings, ranks)["zero_optimization"]["zero_hpz_partition_size"] == expected
    assert with_nodes_of({}, 2, 4) == {}
