"""What a training run works with, and what a step of it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import Settings
from pipeline.consumption import Consumed
from pipeline.data.loading.stream import Stream
from pipeline.micro_step import MicroBatch, Models, Planned
from pipeline.runtime.checkpoint import Checkpoints
from pipeline.runtime.distributed import World
from pipeline.runtime.engine import Engine
from pipeline.runtime.metrics import SelectionSums
from pipeline.weighting.objective import StepPlan


@dataclass(frozen=True)
class Run:
    """Everything a training run works with."""

    settings: Settings
    world: World
    device: torch.device
    run_dir: Path
    engine: Engine
    models: Models
    stream: Stream
    validation: Stream | None
    checkpoints: Checkpoints


@dataclass(frozen=True)
class BegunStep:
    """A step whose data is there. plan: reads its counts over all ranks, and whether any of them had been asked to stop when
    it was begun. waited: seconds in which this rank waited for the data."""

    micro_batches: list[MicroBatch]
    plan: Callable[[], Planned]
    waited: float


@dataclass(frozen=True)
class StepResult:
    """consumed: what the data was, over all ranks. replaced: what was wrong with the samples whose places padding took.
    sums: this rank's. applied: False where all ranks discarded the step; `bad` then says who met what on which
    samples."""

    plan: StepPlan
    consumed: Consumed
    replaced: list[str]
    sums: SelectionSums
    learning_rate: float
    applied: bool
    bad: str | None
