"""The training loop; the one module that knows the order of things.

A step: fetch its A micro-batches, count their pairs over all ranks, run each (reference, policy, selection, loss,
backward), agree whether every number was finite, apply. `train` puts steps in a row and sees to what happens between
them: metrics, validation, checkpoints, requests to stop.

A step is begun, fetched and counted, before the one before it is run, so that its counts are on the host when they are wanted;
with them comes whether a rank was asked to stop. So nothing here waits for the device but what the loss phase has to repair,
once a micro-batch; and what is logged, when it is logged.
"""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import Settings
from pipeline.consumption import Consumed, settle_damage
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.prefetch import prefetched
from pipeline.micro_step import load_micro_batches, plan, selective_losses
from pipeline.progress import Progress
from pipeline.reporter import Reporter
from pipeline.run import BegunStep, Run, StepResult
from pipeline.runtime.agreement import check_ranks_agree, who_met_bad_numbers
from pipeline.runtime.engine import backward, end_micro_step, gradient_norm, sample_parameter, set_learning_rate
from pipeline.runtime.metrics import SelectionSums
from pipeline.runtime.preemption import EXIT_TRY_AGAIN, StopRequest
from pipeline.schedule import learning_rate
from pipeline.weighting.pools import SHARED_POOLS


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def train(run: Run, stop: StopRequest, allow_changed: bool = False) -> int:
    """Train until `training.steps` or a request to stop; returns the exit code, 0 or `EXIT_TRY_AGAIN`.

    Raises:
        TrainingDivergedError: after `training.max_skipped_steps` in a row; the last checkpoint stays as it was.
    """
    training, logging = run.settings.training, run.settings.logging
    progress = run.checkpoints.resume(run.engine, allow_changed)
    reporter = Reporter(run, progress.step)
    if progress.step == 0:
        reporter.validate(progress)
    for begun, following in begun_ahead(run, progress, stop):
        result = train_step(run, begun, progress)
        advance(progress, result, run.settings)
        reporter.step(progress, result, 0.0 if following is None else following.waited)
        if training.check_ranks_every and progress.step % training.check_ranks_every == 0:
            check_ranks_agree(common_values(run, progress, result), run.device)
        if progress.step % logging.validation_every == 0 or following is None:
            reporter.validate(progress)
        stopping = following is not None and following.plan().said
        if progress.step % run.settings.checkpoint.every == 0 or following is None or stopping:
            run.checkpoints.save(run.engine, progress)
            reporter.restart_clock()
        if stopping:
            break
    reporter.close()
    if progress.step < training.steps:
        reporter.say(f"stopped on request after step {progress.step}; run the same command again to continue")
        return EXIT_TRY_AGAIN
    return 0


def begun_ahead(run: Run, progress: Progress, stop: StopRequest) -> Iterator[tuple[BegunStep, BegunStep | None]]:
    """Each step that is left, and the one after it, which is begun before: its counts are summed over ranks behind the first
    one's work, and have long arrived when they are wanted."""
    batches = prefetched(run.stream.iterate(progress.samples), run.device, depth=2 * run.stream.micro_steps)
    num_steps, num_rows = run.settings.training.steps - progress.step, run.settings.data.global_batch
    first_samples = range(progress.samples, progress.samples + num_steps * num_rows, num_rows)
    steps = (begin_step(run, batches, first_sample, stop.is_made) for first_sample in first_samples)
    begun = next(steps, None)
    while begun is not None:
        following = next(steps, None)
        yield begun, following
        begun = following


def begin_step(run: Run, batches: Iterator[Batch], first_sample: int, asked_to_stop: bool = False) -> BegunStep:
    """Fetch this rank's next A micro-batches and have them counted over all ranks. `first_sample`: the number of the step's
    first row in the run."""
    started = time.perf_counter()
    settings, micro_steps = run.settings, run.stream.micro_steps
    fetched = list(itertools.islice(batches, micro_steps))
    waited = time.perf_counter() - started
    num_heads, num_sources = settings.model.num_prediction_heads, len(run.stream.manifest.source_names) or 1
    micro_batches = load_micro_batches(fetched, first_sample, num_heads, run.world.size, run.world.rank, run.device)
    read = plan(micro_batches, settings.training, settings.head_weights, num_sources, run.models.group, asked_to_stop)
    return BegunStep(micro_batches, read, waited)


def train_step(run: Run, begun: BegunStep, progress: Progress) -> StepResult:
    """One optimiser step."""
    settings, training, micro_batches = run.settings, run.settings.training, begun.micro_batches
    counts, consumed, _ = begun.plan()
    batches = [micro.batch for micro in micro_batches]
    replaced = settle_damage(consumed, batches, settings.data, progress.corrupt_samples)
    rate = learning_rate(training, progress.applied_steps)
    set_learning_rate(run.engine, rate)
    num_heads, num_sources = settings.model.num_prediction_heads, len(consumed.tokens_by_source)
    sums, applied = SelectionSums(num_heads, num_sources, run.device), False
    run.engine.module.bad_gradient_rows.clear()
    losses_of_each = selective_losses(run.models, micro_batches, counts, training, progress.prediction)
    for micro, losses in zip(micro_batches, losses_of_each, strict=True):
        sums.add(losses, micro.valid_BTH, micro.batch.sources_BT)
        is_last = micro is micro_batches[-1]
        backward(run.engine, losses.loss * all_finite_or_nan(sums) if is_last else losses.loss)
        applied = end_micro_step(run.engine)
    keys = [batch.keys for batch in batches]
    bad = None if applied else who_met_bad_numbers(sums.bad_rows, run.engine.module.bad_gradient_rows, keys)
    return StepResult(counts, consumed, replaced, sums, rate, applied, bad)


def all_finite_or_nan(sums: SelectionSums) -> Tensor:
    """1, or NaN where any rank met a loss that was not finite in this step.

    As a factor of the last micro-batch's loss it makes the gradient NaN on every rank, so that the engine's own check
    discards the whole step: one mechanism for bad losses and bad gradients, and no wait for the device.
    """
    finite = sums.finite.float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return torch.where(finite > 0, 1.0, math.nan)


def advance(progress: Progress, result: StepResult, settings: Settings) -> None:
    """Count a step; its samples are consumed whether or not it was applied."""
    progress.step += 1
    progress.samples += settings.data.global_batch
    count_consumed(progress, result.consumed)
    progress.skipped_steps += not result.applied
    progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
    if result.applied and settings.training.selection_pool in SHARED_POOLS:
        progress.prediction = progress.prediction.after(result.sums.thresholds)
    if progress.skipped_in_a_row >= settings.training.max_skipped_steps:
        raise TrainingDivergedError(
            f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, met numbers that were not finite; in the "
            f"last of them {result.bad}. The last checkpoint is untouched. Lower training.learning_rate, or look at the samples"
        )


def count_consumed(progress: Progress, consumed: Consumed) -> None:
    progress.tokens += consumed.tokens
    progress.corrupt_samples += consumed.damaged
    progress.tokens_by_source = add_up(progress.tokens_by_source, consumed.tokens_by_source)
    progress.samples_by_source = add_up(progress.samples_by_source, consumed.samples_by_source)


def add_up(before: list[int], more: list[int]) -> list[int]:
    """Their sums; `before` is empty at the start of a run."""
    return [sum(pair) for pair in itertools.zip_longest(before, more, fillvalue=0)]


def common_values(run: Run, progress: Progress, result: StepResult) -> dict[str, Any]:
    """What every rank must hold alike after a step; of the weights a sample of one parameter, each in its turn."""
    training = run.settings.training
    values: dict[str, Any] = {
        "progress": progress.to_json(),
        "learning rate": result.learning_rate,
        "gradient norm": gradient_norm(run.engine),
    }
    if training.selection_pool in SHARED_POOLS:
        values["thresholds"] = [threshold_K.tolist() for threshold_K in result.sums.thresholds]
    name, sample = sample_parameter(run.engine, progress.step // (training.check_ranks_every or 1))
    return values | {f"parameter {name}": sample}
