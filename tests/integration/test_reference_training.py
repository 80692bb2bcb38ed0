"""A reference that the job trains itself: made once, kept, and refused where it is not what the settings ask for."""

from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Settings
from tests.integration.test_pipeline_rho1 import job_on_this_rank, settings_for
from tests.ranks import run_ranks


def train_then_change(settings: Settings, other_reference: Settings, other_policy: Settings, run_dir: Path) -> dict[str, Any]:
    from pipeline.job import run_job, with_trained_reference
    from pipeline.runtime.preemption import StopRequest

    found: dict[str, Any] = {"exit_code": run_job(job_on_this_rank(settings, run_dir))}
    made = (run_dir / "reference" / "model.safetensors").stat().st_mtime_ns
    try:
        run_job(job_on_this_rank(other_reference, run_dir))
    except ConfigError as error:
        found["problems"] = error.problems
    job = job_on_this_rank(other_policy, run_dir)
    kept, _ = with_trained_reference(job, other_policy, StopRequest(run_dir, job.world))
    found["kept"] = kept.reference.path
    found["made again"] = (run_dir / "reference" / "model.safetensors").stat().st_mtime_ns != made
    return found


def test_a_trained_reference_is_kept_and_another_one_is_not_taken_for_it(tiny_data: Path, tmp_path: Path) -> None:
    common = ("training.steps=1", "data.num_workers=0", "logging.validation_samples=16", "reference.path=null")
    common += (f"reference.training_data={tiny_data / 'train'}",)
    unused = tmp_path  # reference.path is null
    run_dir = tmp_path / "run"
    (found,) = run_ranks(
        train_then_change,
        1,
        settings_for(tiny_data, unused, *common, "reference.training_steps=2"),
        settings_for(tiny_data, unused, *common, "reference.training_steps=3"),
        settings_for(tiny_data, unused, *common, "reference.training_steps=2", "training.k_percent=0.3"),
        run_dir,
    )
    assert found["exit_code"] == 0
    assert found["problems"][0] == f"reference in {run_dir / 'reference'}: training.steps: was 2, is now 3"
    assert found["problems"][-1].startswith(f"remove {run_dir / 'reference'} to train it again")
    assert found["kept"] == run_dir / "reference"
    assert not found["made again"]
