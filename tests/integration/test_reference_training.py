"""A reference that the job trains itself: made once, kept, and refused where it is not what the settings ask for."""

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ConfigError, Settings
from pipeline.saved_model import find_model
from tests.integration.test_pipeline_rho1 import job_on_this_rank, settings_for
from tests.ranks import run_ranks
from tests.tiny import SEQUENCE_LENGTH


def train_then_change(settings: Settings, other_reference: Settings, other_policy: Settings, run_dir: Path) -> dict[str, Any]:
    from pipeline.job import run_job, with_trained_reference
    from pipeline.runtime.logbook import read_records
    from pipeline.runtime.preemption import StopRequest

    stop, found = StopRequest(), {}
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    found["stopped"] = run_job(job_on_this_rank(settings, run_dir), stop)
    found["file is gone"] = not (run_dir / "STOP").exists()
    found["policy's steps"] = [record["step"] for record in read_records(run_dir) if "split" not in record]
    found["exit code"] = run_job(job_on_this_rank(settings, run_dir), stop)
    made = (run_dir / "reference" / "model.safetensors").stat().st_mtime_ns
    try:
        run_job(job_on_this_rank(other_reference, run_dir), stop)
    except ConfigError as error:
        found["problems"], found["remedy"] = error.problems, error.remedy
    job = job_on_this_rank(other_policy, run_dir)
    kept, _ = with_trained_reference(job, other_policy, stop)
    found["kept"] = kept.reference.path
    found["made again"] = (run_dir / "reference" / "model.safetensors").stat().st_mtime_ns != made
    return found


def test_a_trained_reference_is_kept_and_another_one_is_not_taken_for_it(tiny_data: Path, tmp_path: Path) -> None:
    common = (
        "training.steps=2",
        "logging.metrics_every=1",
        "data.num_workers=0",
        "logging.validation_samples=16",
        "reference.path=null",
    )
    common += (f"reference.training_data={tiny_data / 'train'}",)
    unused = tmp_path  # reference.path is null
    run_dir = tmp_path / "run"
    (found,) = run_ranks(
        train_then_change,
        1,
        settings_for(tiny_data, unused, *common, "reference.training_steps=1"),
        settings_for(tiny_data, unused, *common, "reference.training_steps=3"),
        settings_for(tiny_data, unused, *common, "reference.training_steps=1", "training.k_percent=0.3"),
        run_dir,
    )
    # Asked to stop in the reference's last step: the policy makes one step, saves, and the same command finishes it.
    assert (found["stopped"], found["file is gone"], found["policy's steps"]) == (75, True, [1])
    assert found["exit code"] == 0
    assert found["problems"][0] == f"reference in {run_dir / 'reference'}: training.steps: was 1, is now 3"
    assert found["remedy"].startswith(f"remove {run_dir / 'reference'} to train it again")
    assert found["kept"] == run_dir / "reference"
    assert not found["made again"]

    # Both are models that the other commands find, with a tokenizer of their own; the reference says its limits to others.
    for place in (run_dir, run_dir / "reference"):
        model = find_model(place)
        file, special = model.tokenizer()
        assert (file, special.end_of_document_id) == (place / "tokenizer.json", 0)
        assert model.context_length == SEQUENCE_LENGTH
    config = json.loads((run_dir / "reference" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (0, None, 0)


def largest_tensor_after_training(settings: Settings, run_dir: Path) -> int:
    from pipeline.job import with_trained_reference
    from pipeline.runtime.preemption import StopRequest

    with_trained_reference(job_on_this_rank(settings, run_dir), settings, StopRequest())
    return max(found.untyped_storage().nbytes() for found in gc.get_objects() if isinstance(found, torch.Tensor))


def test_the_policy_gets_back_the_memory_in_which_the_reference_was_trained(tiny_data: Path, tmp_path: Path) -> None:
    shape = ("model.dim=32", "model.num_layers=2", "model.num_attention_heads=2", "reference.training_steps=1")
    training = ("data.num_workers=0", "reference.path=null", f"reference.training_data={tiny_data / 'train'}", *shape)
    (left,) = run_ranks(largest_tensor_after_training, 1, settings_for(tiny_data, tmp_path, *training), tmp_path / "run")
    assert left < 4 * 300 * 32, "weights, gradients and optimiser state lie in one tensor each, larger than the embedding"


def prepare_with_foreign_validation(settings: Settings, run_dir: Path) -> Sequence[str]:
    from pipeline.job import with_builtin_data

    job = job_on_this_rank(settings, run_dir)
    try:
        with_builtin_data(job)
    except ConfigError as error:
        return error.problems
    return []


def test_data_that_the_job_makes_is_compared_with_what_was_named(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "corpus.json").write_text('{"sequence_length": 16, "vocab_size": 4096, "seed": 0}')
    for name in ("mix", "library", "validation"):
        made = shutil.copytree(tiny_data / "train", tmp_path / "run" / "data" / name)
        manifest = json.loads((made / "manifest.json").read_text())
        (made / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 4096, "tokenizer_sha256": "0" * 64}))
    overrides = ("data.path=null", "data.builtin=true", "training.k_percent=1", "reference.path=null")
    settings = settings_for(tiny_data, tmp_path, *overrides)
    (problems,) = run_ranks(prepare_with_foreign_validation, 1, settings, tmp_path / "run")
    foreign = tiny_data / "validation"
    assert problems == [
        f"{foreign}: prepared with another tokenizer than the other data of this run; prepare both with the same"
    ]
