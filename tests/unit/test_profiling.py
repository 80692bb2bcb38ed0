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
    ("steps", "from_step", "to_step", "is_traced"),
    [
        ([1, 2], 0, 4, True),
        ([3, 3], 0, 4, True),
        ([3, 9], 0, 4, True),
        ([3, 4], 2, 4, True),
        ([3, 4], 3, 5, False),
        (None, 0, 4, False),
    ],
)
def test_a_trace_begins_at_its_first_step_and_is_written_at_the_last_or_at_the_end(
    tmp_path: Path, steps: list[int] | None, from_step: int, to_step: int, is_traced: bool
) -> None:
    profiler = StepProfiler(tmp_path, 3, steps, torch.device("cpu"))
    for step in range(from_step, to_step + 1):
        profiler.between_steps(step)
    profiler.end()
    name = "rank-00003-steps-{}-{}.json.gz".format(*(steps or (0, 0)))
    assert [path.name for path in tmp_path.glob("profile/*")] == [name] * is_traced


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
