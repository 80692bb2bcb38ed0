"""The parts of a training run, and the outcome of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Settings
from pipeline.consumption import Consumed
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.data.loading.stream import Stream
from pipeline.micro_step import MicroBatch, Models, PendingStep
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.distributed import World
from pipeline.runtime.engine import Engine
from pipeline.runtime.metrics import SelectionSums
from pipeline.weighting.objective import StepCounts


@dataclass(frozen=True)
class Run:
    """Everything a training run works with. fixed_batch: the same on all ranks and in each start of the run; checkpoints hold
    its losses, to see that what was loaded is what was saved."""

    settings: Settings
    world: World
    device: torch.device
    run_dir: Path
    engine: Engine
    models: Models
    stream: Stream
    held_out: Sequence[HeldOutRows]
    checkpoints: Checkpoints
    fixed_batch: Batch


@dataclass(frozen=True)
class FetchedStep:
    """A step whose data is there. pending: its counts over all ranks, and whether any of them had been asked to stop when it
    was fetched. waited: seconds in which this rank waited for the data."""

    micro_batches: list[MicroBatch]
    pending: PendingStep
    waited: float


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step. consumed: its data, over all ranks. replaced: the damaged samples that rows of padding replaced,
    a sentence each. sums: this rank's. loss: the objective, over all ranks, a scalar on the device. gradient_norm: of the whole
    gradient, before clipping; None where there is none. checksums: of this rank's copies of weights, by name, if they are to be
    compared after this step. applied: False where all ranks discarded the step; `bad` then names the rank, head and
    samples."""

    counts: StepCounts
    consumed: Consumed
    replaced: list[str]
    sums: SelectionSums
    loss: Tensor
    gradient_norm: Tensor | float | None
    learning_rate: float
    applied: bool
    bad: str | None
    checksums: Mapping[str, Tensor] = field(default_factory=dict)
