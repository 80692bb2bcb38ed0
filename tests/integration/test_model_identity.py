"""A run knows its models by content: resuming with a changed one is refused, and what a folder says is checked before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError, ModelSettings, Settings
from pipeline.data.shards.manifest import read_manifest
from pipeline.model.export import save_model
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.progress import Progress
from tests.checkpointing import write_state
from tests.integration.test_pipeline_rho1 import DEEPSPEED_JSON, job_on_this_rank, settings_for
from tests.ranks import run_ranks


def resume_after(settings: Settings, run_dir: Path, changed: Path) -> list[str]:
    """What is refused once a byte in the middle of a model's weights, then its rope_theta, has changed since a checkpoint."""
    from pipeline.assembly import resolve_settings

    def checkpoints() -> Any:
        return resolve_settings(job_on_this_rank(settings, run_dir), settings, run_dir)[2]

    # A checkpoint of the models as they are.
    identity = checkpoints().identity
    write_state(run_dir, Progress(step=7), identity)
    assert checkpoints().check(allow_changed=False).step == 7

    refused = []
    weights, config = changed / "model.safetensors", changed / "config.json"
    content, described = bytearray(weights.read_bytes()), config.read_text()
    content[len(content) // 2] ^= 1
    for file, edited in ((weights, content), (config, described.replace("10000.0", "20000.0").encode())):
        before = file.read_bytes()
        file.write_bytes(edited)
        with pytest.raises(ConfigError) as caught:
            checkpoints().check(allow_changed=False)
        refused.append(caught.value.problems[0])
        file.write_bytes(before)
    checkpoints().check(allow_changed=False)
    return refused


def test_a_run_is_not_resumed_with_a_changed_reference(tiny_data: Path, tiny_reference: Path, tmp_path: Path) -> None:
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    (refused,) = run_ranks(resume_after, 1, settings_for(tiny_data, reference), tmp_path / "run", reference)
    assert [problem.partition(": was '")[0] for problem in refused] == ["reference model"] * 2
    weights, config = (problem.partition(" (")[2] for problem in refused)
    assert weights == "model.safetensors has other bytes) (step-00000007 was trained with the former)"
    assert config == "config.json rope_theta: 10000.0 → 20000.0) (step-00000007 was trained with the former)"


def problems_of(settings: Settings, run_dir: Path) -> list[str]:
    from pipeline.checks import check_before_start
    from pipeline.runtime.distributed import World

    try:
        check_before_start(settings, DEEPSPEED_JSON, run_dir, World(0, 1, 0, 1))
    except ConfigError as error:
        return error.problems
    return []


def test_rows_longer_than_a_model_was_made_for_are_refused(tiny_data: Path, tiny_reference: Path, tmp_path: Path) -> None:
    short = shutil.copytree(tiny_reference, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    shape = [
        f"model.{key}" for key in ("dim=16", "num_layers=2", "num_attention_heads=2", f"ffn_dim={config['intermediate_size']}")
    ]
    settings = settings_for(tiny_data, short, *shape, f"model.pretrained={short}")
    for longest, refused in ((16, []), (15, ["model.pretrained", "reference.path"])):
        (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest}))
        problems = problems_of(settings, tmp_path / "run")
        assert sorted(problem.partition(":")[0] for problem in problems) == refused
        assert all(
            "was made for 15 positions (max_position_embeddings), data.sequence_length is 16" in each for each in problems
        )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 15}, "max_position_embeddings"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 15, "num_key_value_heads": 2},
            "sliding_window",
        ),
    ],
)
def test_rows_on_which_a_model_would_compute_otherwise_are_refused(tiny_data, tiny_reference, tmp_path, changes, key) -> None:
    folder = shutil.copytree(tiny_reference, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (problem,) = problems_of(settings_for(tiny_data, folder), tmp_path / "run")
    assert f"was made for 15 positions ({key}), data.sequence_length is 16; a longer row is another computation" in problem
    (folder / "config.json").write_text(json.dumps(config | {key: 16}))
    assert problems_of(settings_for(tiny_data, folder), tmp_path / "run") == []


def test_a_model_may_know_more_ids_than_the_data_has_but_not_fewer(tiny_data, tmp_path) -> None:
    from pipeline.derived import vocab_size_of

    vocab_size = read_manifest(tiny_data / "train").vocab_size
    shape: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_attention_heads": 2}
    for number, problem in (
        (vocab_size + 20, None),
        (vocab_size - 1, f"knows {vocab_size - 1} ids, the data has {vocab_size}; prepare the data with the model's own"),
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = MTPModel(ModelSettings(**shape, num_prediction_heads=1, vocab_size=number))
        initialize_weights(model)
        save_model(model, folder)
        shutil.copyfile(tiny_data / "tokenizer.json", folder / "tokenizer.json")
        overrides = [f"model.{key}={value}" for key, value in shape.items()]
        settings = settings_for(tiny_data, folder, *overrides, f"model.pretrained={folder}")
        problems = problems_of(settings, tmp_path / "run")
        if problem is None:
            assert problems == []
            assert vocab_size_of(settings, vocab_size) == number
        else:
            assert any(each.startswith("model.pretrained: ") and problem in each for each in problems)


def test_a_run_is_not_resumed_with_other_pretrained_weights(tiny_data: Path, tiny_reference: Path, tmp_path: Path) -> None:
    pretrained = shutil.copytree(tiny_reference, tmp_path / "pretrained")
    settings = settings_for(tiny_data, tiny_reference, f"model.pretrained={pretrained}", "model.dim=16")
    (refused,) = run_ranks(resume_after, 1, settings, tmp_path / "run", pretrained)
    # Another rope_theta is met before, because the policy would have it too.
    assert refused[0].startswith("pretrained model: was '")
