"""The training's own step under an engine, without the job round it; with the gradient read just before the optimiser would
use it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Settings, TrainingSettings
from pipeline.data.loading.batch import Batch
from pipeline.micro_step import MicroBatch, Models, comparisons, policy_losses, selectors_of
from pipeline.weighting.loss_phase import HeadLosses
from pipeline.weighting.objective import ObjectiveSettings, StepCounts
from pipeline.weighting.prediction import Prediction

CPU = torch.device("cpu")
Answer = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""(gradients by name, the step's metrics)."""


def objective_of(training: TrainingSettings, num_heads: int = 4) -> ObjectiveSettings:
    return ObjectiveSettings(training.k_percent, [1.0] * num_heads, training.selection_pool, training.normalize_by)


def losses_of(
    models: Models,
    micro_batches: list[MicroBatch],
    counts: StepCounts,
    training: TrainingSettings,
    prediction: Prediction | None = None,
) -> Iterator[HeadLosses]:
    """Join the three stages of a micro-step."""
    compared = comparisons(models, micro_batches, training)
    selectors = selectors_of(models, micro_batches, compared, counts, training, prediction or Prediction())
    return policy_losses(models, micro_batches, selectors, counts, training)


def run_of(
    settings: Settings,
    engine: Any,
    reference: Any,
    micro_steps: int,
    device: torch.device = CPU,
    policy: Any = None,
) -> Any:
    """What `train_step` works with, on each rank of a process group. policy: what runs in the engine's place."""
    from pipeline.run import Run
    from pipeline.runtime.distributed import World

    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Run(
        settings=settings,
        world=World(rank, world_size, rank, world_size),
        device=device,
        run_dir=Path(),
        engine=engine,
        models=Models(policy or engine, reference, settings.reference.horizon, dist.group.WORLD),
        stream=SimpleNamespace(micro_steps=micro_steps, manifest=SimpleNamespace(source_names=())),  # type: ignore[arg-type]
        held_out=(),
        checkpoints=None,  # type: ignore[arg-type]
        fixed_batch=None,  # type: ignore[arg-type]
    )


class WatchedEngine:
    """The policy's engine; remembers the gradient of a step."""

    def __init__(self, settings: Settings, config: dict[str, Any]):
        from pipeline.runtime.engine import build_policy

        self.engine = build_policy(settings, config)
        self.take_step, self.engine.step = self.engine.step, self.read_then_step
        self.gradients: dict[str, torch.Tensor] = {}

    def read_then_step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self.engine.is_gradient_accumulation_boundary():
            for name, parameter in self.engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None, name
                self.gradients[name] = gradient.clone()
        self.take_step()

    def step(
        self,
        settings: Settings,
        reference: Any,
        batches: Sequence[Batch],
        prediction: Prediction,
        device: torch.device = CPU,
        number: int = 0,
    ) -> Answer:
        """One step over this rank's micro-batches. number: of the step, in the run."""
        from pipeline.progress import Progress
        from pipeline.train import fetch_step, train_step

        self.gradients = {}
        run = run_of(settings, self.engine, reference, len(batches), device)
        result = train_step(run, fetch_step(run, iter(batches), number, 0), Progress(prediction=prediction))
        return self.gradients, result.sums.record(result.counts.scale_H, ("",), dist.group.WORLD)
