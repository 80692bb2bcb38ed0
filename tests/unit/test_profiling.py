"""Which steps are traced, in whatever life of a run, and what the switch to deterministic kernels sets."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.recipe import load_settings
from pipeline.runtime.profiling import StepProfiler, use_deterministic_kernels

QUIET = ("training.k_percent=1", "data.path=data")


@pytest.mark.parametrize(
    ("steps", "from_step", "to_step", "traced"),
    [
        ([1, 2], 0, 4, "1-2"),
        ([3, 3], 0, 4, "3-3"),
        ([3, 9], 0, 4, "3-9"),
        ([3, 4], 2, 4, "3-4"),
        # Resumed among them, before the last one, and after it.
        ([4, 8], 5, 9, "6-8"),
        ([3, 4], 3, 5, "4-4"),
        ([3, 4], 4, 5, None),
        (None, 0, 4, None),
    ],
)
def test_a_trace_begins_at_its_first_step_or_where_a_run_resumes_and_is_written_at_the_last_or_at_the_end(
    tmp_path: Path, steps: list[int] | None, from_step: int, to_step: int, traced: str | None
) -> None:
    profiler = StepProfiler(tmp_path, 3, steps, torch.device("cpu"))
    for step in range(from_step, to_step + 1):
        profiler.between_steps(step)
    profiler.end()
    assert [path.name for path in tmp_path.glob("profile/*")] == ([f"rank-00003-steps-{traced}.json.gz"] if traced else [])


def test_steps_that_were_over_before_a_run_went_on_are_said_unless_they_were_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, 0, [4, 8], torch.device("cpu"))
    assert profiler.missed(7) is None
    assert "nothing is traced, since the run goes on after step 8, and steps 4 to 8 are over" in str(profiler.missed(8))
    assert StepProfiler(tmp_path, 0, None, torch.device("cpu")).missed(8) is None
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank-00000-steps-6-8.json.gz").touch()
    assert profiler.missed(8) is None


@pytest.mark.parametrize("text", ["[10]", "[13, 10]", "[0, 3]", "10", "[1, 2, 3]", "[]"])
def test_what_is_no_range_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"logging\.profile_steps"):
        load_settings(None, [*QUIET, f"logging.profile_steps={text}"])
    assert load_settings(None, [*QUIET, "logging.profile_steps=[10, 13]"]).logging.profile_steps == [10, 13]


def test_the_switch_sets_all_that_decides_and_leaves_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        use_deterministic_kernels()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
