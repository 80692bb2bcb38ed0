"""The training's own step under its engine, with the gradient read just before the optimiser would use it."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.data.batch import Batch
from pipeline.weighting.prediction import Prediction

Answer = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""(gradients by name, the step's metrics)."""


class WatchedEngine:
    """The policy's engine; remembers the gradient of a step."""

    def __init__(self, settings: Settings, config: dict[str, Any]):
        from pipeline.runtime.engine import build_policy

        self.engine = build_policy(settings, config)
        self.take_step, self.engine.step = self.engine.step, self.read_then_step
        self.reads = True
        self.gradients: dict[str, torch.Tensor] = {}

    def read_then_step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self.reads and self.engine.is_gradient_accumulation_boundary():
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
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Answer:
        """One step over this rank's micro-batches."""
        from pipeline.micro_step import Models
        from pipeline.runtime.checkpoint import Progress
        from pipeline.runtime.distributed import World
        from pipeline.train import Run, train_step

        rank, world_size = dist.get_rank(), dist.get_world_size()
        run = Run(
            settings=settings,
            world=World(rank, world_size, rank, world_size),
            device=device,
            run_dir=Path(),
            engine=self.engine,
            models=Models(self.engine, reference, "shifted", dist.group.WORLD),
            stream=SimpleNamespace(micro_steps=len(batches), manifest=SimpleNamespace(source_names=())),  # type: ignore[arg-type]
            validation=None,
            checkpoints=None,  # type: ignore[arg-type]
        )
        self.gradients = {}
        result = train_step(run, iter(batches), Progress(prediction=prediction))
        return self.gradients, result.sums.record(result.plan.scale_H, ("",), dist.group.WORLD)
