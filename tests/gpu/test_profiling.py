"""The history of the allocator, which a trace of steps has on a GPU alone."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.runtime.profiling import StepProfiler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIB = 2**20


def allocated(snapshot: dict[str, Any]) -> set[int]:
    """Sizes in MiB that were asked of the allocator by a snapshot's history; all sizes of the test are whole MiB."""
    events = [event for of_device in snapshot["device_traces"] for event in of_device]
    return {event["size"] // MIB for event in events if event["action"] == "alloc"}


def test_a_snapshot_has_what_was_allocated_in_the_traced_steps_and_ends_with_them(tmp_path: Path) -> None:
    device = torch.device("cuda")
    profiler = StepProfiler(tmp_path, 0, [2, 3], device)
    for step, size in enumerate((5, 7, 11, 13)):
        profiler.between_steps(step)
        torch.zeros(size * MIB, dtype=torch.uint8, device=device)
    profiler.end()

    snapshot, trace = sorted((tmp_path / "profile").iterdir())
    assert [snapshot.name, trace.name] == ["rank-00000-steps-2-3-memory.pickle", "rank-00000-steps-2-3.json.gz"]
    of_steps = allocated(pickle.loads(snapshot.read_bytes()))
    assert {5, 7, 11, 13} & of_steps == {7, 11}
    # Afterwards nothing more is recorded, which would cost time and memory in each later step.
    assert 13 not in allocated(torch.cuda.memory._snapshot())
