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
    """Traces the steps from the first to the last of `steps`, both included; nothing without them. A run that is resumed among
    them is traced from there on."""

    def __init__(self, run_dir: Path, rank: int, steps: list[int] | None, device: torch.device):
        self.steps, self.device = steps, device
        self._folder, self._name = run_dir / PROFILE_FOLDER, f"rank-{rank:05d}-steps-"
        self._path = self._folder
        self._profile: Any = None

    def between_steps(self, step: int) -> bool:
        """Begin or end, where `step` steps are done and the next one is to come; true if that took a while."""
        if self.steps is None:
            return False
        first, last = self.steps
        if self._profile is None and first <= step + 1 <= last:
            self._path = self._folder / f"{self._name}{step + 1}-{last}.json.gz"
            self._begin()
            return True
        if step == last:
            self.end()
            return True
        return False

    def missed(self, step: int) -> str | None:
        """Say that the steps are over where a run begins after `step` steps, if none of them was traced before."""
        if self.steps is None or step < self.steps[1] or any(self._folder.glob(f"{self._name}*-{self.steps[1]}.json.gz")):
            return None
        first, last = self.steps
        return (
            f"logging.profile_steps: nothing is traced, since the run goes on after step {step}, and steps {first} to {last} "
            "are over; name later ones"
        )

    def end(self) -> None:
        """Write what was traced, if anything was."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._path):
            running.export_chrome_trace(str(self._path))
            if self.device.type == "cuda":
                # A pickle, in the form that torch's viewer takes; nothing here reads it.
                torch.cuda.memory._dump_snapshot(str(self._path).removesuffix(".json.gz") + "-memory.pickle")
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
