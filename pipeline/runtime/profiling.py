"""Traces of some steps of a run, and the switch to deterministic kernels: what one turns on to look into a run.

The phases of a step are marked in the code by `torch.profiler.record_function`: data, reference, policy, loss, exchange,
backward and step. Unless a profiler runs a mark costs about a microsecond. `RUN/profile/` has a trace a rank, for
ui.perfetto.dev, and on CUDA the history of the allocator, for docs.pytorch.org/memory_viz.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.storage.whole_file import naming

PROFILE_FOLDER = "profile"
_MEMORY_EVENTS = 100_000


class StepProfiler:
    """Traces the steps from the first to the last of `steps`, both included; nothing without them."""

    def __init__(self, run_dir: Path, rank: int, steps: list[int] | None, device: torch.device):
        self.steps, self.device = steps, device
        first, last = steps or (0, 0)
        self.path = run_dir / PROFILE_FOLDER / f"rank-{rank:05d}-steps-{first}-{last}.json.gz"
        self._profile: Any = None

    def between_steps(self, step: int) -> bool:
        """Begin or end, where `step` steps are done and the next one is to come; true if that took a while."""
        if self.steps is not None and step + 1 == self.steps[0]:
            self._begin()
            return True
        if self.steps is not None and step == self.steps[1]:
            self.end()
            return True
        return False

    def end(self) -> None:
        """Write what was traced, if anything was."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path):
            running.export_chrome_trace(str(self.path))
            if self.device.type == "cuda":
                # A pickle, in the form that torch's viewer takes; nothing here reads it.
                torch.cuda.memory._dump_snapshot(str(self.path).removesuffix(".json.gz") + "-memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()


def use_deterministic_kernels() -> None:
    """Have torch take deterministic kernels, or raise where there is none; to be called before CUDA is first used.

    cuBLAS reads how much memory it may use, on which the order of its sums depends, when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
