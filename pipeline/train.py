"""The training loop; the one module that knows the order of things.

A step: fetch its A micro-batches, count their pairs over all ranks, run each (reference, policy, selection, loss,
backward), agree that every number was finite, apply. `train` runs step after step and does what lies between them: metrics,
validation, checkpoints, requests to stop.

A step is fetched and counted before the one before it is run, so that its counts, and requests to stop, are on the host when
they are needed. The host waits for the device once a micro-batch, to size the loss phase's repair, when metrics are logged, and
where loss spikes are answered once a step.
"""

import hashlib
import itertools
import time
from collections.abc import Generator, Iterator

import torch
from torch.profiler import record_function

from pipeline.config import Settings
from pipeline.consumption import Consumed, handle_damage
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.prefetch import prefetched, training_depth
from pipeline.evaluate import losses_of_batch
from pipeline.micro_step import NO_FLAGS, RankFlags, comparisons, count_step, load_micro_batches, policy_losses, selectors_of
from pipeline.progress import Progress
from pipeline.rank_checks import checksums_of, common_values, is_check_due
from pipeline.reporter import Reporter
from pipeline.rollback import first_to_skip, go_back, has_spiked, ways_back
from pipeline.run import FetchedStep, Run, StepResult
from pipeline.runtime import heartbeat
from pipeline.runtime.agreement import check_ranks_agree
from pipeline.runtime.checkpoint.state import HeldOut
from pipeline.runtime.engine import (
    backward,
    begin_step,
    end_micro_step,
    give_up_gathered,
)
from pipeline.runtime.metrics import SelectionSums
from pipeline.runtime.non_finite import TrainingDivergedError, describe_bad_numbers, finite_and_loss
from pipeline.runtime.preemption import EXIT_TRY_AGAIN, StoppedError, StopRequest
from pipeline.runtime.profiling import StepProfiler
from pipeline.schedule import learning_rate, objective_at
from pipeline.weighting.pools import SHARED_POOLS


def train(run: Run, stop: StopRequest, allow_changed: bool = False) -> int:
    """Train until `training.steps` or a request to stop; returns the exit code, 0 or `EXIT_TRY_AGAIN`.

    Raises:
        TrainingDivergedError: after `training.max_skipped_steps` in a row, or a loss spike after `training.max_rollbacks`;
            the last checkpoint stays as it was.
        StoppedError: a signal to stop came before the first step, when there is nothing to save.
    """
    progress = run.checkpoints.resume(run.engine, allow_changed, lambda: held_out_losses(run))
    if progress.step < run.settings.training.steps:
        run.checkpoints.prepare(run.engine)
    gone_back_to: Progress | None = progress
    while gone_back_to is not None:
        progress = gone_back_to
        reporter = Reporter(run, progress.step)
        reporter.begin(progress)
        if not reporter.validate_if_due(progress, stop):
            raise StoppedError
        gone_back_to = train_on(run, progress, reporter, stop)
        reporter.close()

    if progress.step < run.settings.training.steps or reporter.broken_off:
        reporter.say(f"stopped on request after step {progress.step}; run the same command again to continue")
        return EXIT_TRY_AGAIN
    return 0


def train_on(run: Run, progress: Progress, reporter: Reporter, stop: StopRequest) -> Progress | None:
    """Train from where `progress` stands, and advance it, until the last step or a request to stop; returns None then.

    Where a loss spike is answered by going back, it ends as well, and returns the progress of the checkpoint that was loaded.
    """
    training = run.settings.training
    if progress.step == 0 and training.rollback_on_spike is not None:
        # A spike before the first periodic checkpoint goes back to the beginning.
        save(run, progress, in_background=True)

    save_due = False
    profiler = StepProfiler(run.run_dir, run.world.rank, run.settings.logging.profile_steps, run.device)
    profiler.between_steps(progress.step)
    if missed := profiler.missed(progress.step):
        reporter.say(missed)
    steps = fetched_ahead(run, progress, stop)
    for fetched, following in steps:
        # One optimiser step.
        result = train_step(run, fetched, progress)
        try:
            advance(progress, result, run.settings)
        except TrainingDivergedError as error:
            raise TrainingDivergedError(f"{error}. {ways_back(run.checkpoints.steps())}") from None

        heartbeat.enter("training", progress.step)

        # Metrics, and the check that ranks still agree.
        waited = following.waited if following is not None else 0.0
        reporter.step(progress, result, waited + (fetched.waited if reporter.clock.first is None else 0.0))
        if is_check_due(training, progress.step):
            check_ranks_agree(common_values(run, progress, result), run.device)
        if profiler.between_steps(progress.step):
            reporter.clock.restart()

        # A loss spike: what was fetched ahead is given up, once its counts have arrived.
        if has_spiked(progress, result, training):
            if following is not None:
                following.pending.read()
            returned = go_back(run, progress, reporter.say, lambda: held_out_losses(run))
            if returned is not None:
                steps.close()
                profiler.end()
                return returned

        # Validation, samples.
        is_last = following is None
        validated = reporter.validate_if_due(progress, stop)
        reporter.sample_if_due(progress)
        reporter.passage_if_due(progress)

        # Checkpoint: in the background at its interval, but not after a step that was discarded; at once at the end and
        # before a stop.
        flags = NO_FLAGS if following is None else following.pending.read().flags
        is_stopped = flags.stop_requested or not validated
        save_due |= progress.step % run.settings.checkpoint.every == 0 or flags.save_due
        if flags.save_written:
            with reporter.saving(progress.step):
                run.checkpoints.go_on()
        if is_last or is_stopped or (save_due and result.applied):
            at_once = is_last or is_stopped
            reporter.sync()
            with reporter.saving(progress.step):
                save(run, progress, in_background=not at_once)
            save_due = False
            reporter.clock.restart()
        if is_stopped:
            break
    profiler.end()
    return None


def save(run: Run, progress: Progress, *, in_background: bool) -> None:
    """Save a checkpoint, or begin to."""
    can_return = run.settings.training.rollback_on_spike is not None
    return_to = first_to_skip(progress, run.settings.training) if can_return else None
    with heartbeat.during("saving"):
        run.checkpoints.save(run.engine, progress, held_out_losses(run), in_background=in_background, return_to=return_to)


def fetched_ahead(
    run: Run, progress: Progress, stop: StopRequest
) -> Generator[tuple[FetchedStep, FetchedStep | None], None, None]:
    """Yield each step that is left with the one after it, None after the last.

    The following step is fetched first: its counts are summed over ranks behind the current step's work, and have arrived
    long before they are needed.
    """
    rows = run.stream.iterate(progress.samples, skipped=progress.skipped)
    batches = prefetched(rows, run.device, depth=training_depth(run.stream.micro_steps))
    num_rows = run.settings.data.global_batch
    positions = zip(
        range(progress.step, run.settings.training.steps), itertools.count(progress.samples, num_rows), strict=False
    )
    steps = (fetch_step(run, batches, step, first_sample, flags_of(run, stop)) for step, first_sample in positions)
    fetched = next(steps, None)
    while fetched is not None:
        following = next(steps, None)
        yield fetched, following
        fetched = following


def flags_of(run: Run, stop: StopRequest) -> RankFlags:
    """Collect what this rank has to tell the others."""
    return RankFlags(stop.is_requested, run.checkpoints.is_due_by_time, run.checkpoints.is_written)


def held_out_losses(run: Run) -> HeldOut:
    """Compute each head's loss of the fixed batch that checkpoints remember; collective."""
    run.engine.eval()
    losses = losses_of_batch(run.engine, run.fixed_batch, run.settings.model.num_prediction_heads, run.device)
    run.engine.train()
    give_up_gathered(run.engine)
    return HeldOut(batch=hashlib.sha256(run.fixed_batch.tokens_BT.cpu().numpy().tobytes()).hexdigest(), losses=losses)


def fetch_step(run: Run, batches: Iterator[Batch], step: int, first_sample: int, flags: RankFlags = NO_FLAGS) -> FetchedStep:
    """Fetch this rank's next A micro-batches and count their pairs over all ranks.

    `step` (from 0) and `first_sample` are the numbers of the step, and of its first row, in the whole run.
    """
    settings, world = run.settings, run.world

    # Wait for the data.
    started = time.perf_counter()
    with record_function("data"):
        fetched = list(itertools.islice(batches, run.stream.micro_steps))
    waited = time.perf_counter() - started

    # Put it on the device; count its pairs, whose sums over ranks arrive later.
    num_heads = settings.model.num_prediction_heads
    micro_batches = load_micro_batches(fetched, first_sample, num_heads, world.size, world.rank, run.device)
    num_sources = len(run.stream.manifest.source_names) or 1
    pending = count_step(micro_batches, objective_at(settings, step), num_sources, run.models.group, flags)
    return FetchedStep(micro_batches, pending, waited)


def train_step(run: Run, fetched: FetchedStep, progress: Progress) -> StepResult:
    """Run one optimiser step."""
    settings, training, micro_batches = run.settings, run.settings.training, fetched.micro_batches
    counts, consumed, _ = fetched.pending.read()

    # Damaged samples: all ranks go on, or all stop.
    batches = [micro.batch for micro in micro_batches]
    replaced = handle_damage(consumed, batches, settings.data, progress.corrupt_samples)

    rate = learning_rate(training, progress.applied_steps)
    begin_step(run.engine, rate, trunk_is_frozen=progress.applied_steps < training.freeze_trunk_steps)
    sums = SelectionSums(settings.model.num_prediction_heads, len(consumed.tokens_by_source), run.device)
    run.engine.module.bad_gradient_rows.clear()
    run.engine.module.trunk_gradients.clear()

    # Reference, selection and policy losses, each micro-batch when the loop asks for it; backward.
    compared = comparisons(run.models, micro_batches, training)
    selectors = selectors_of(run.models, micro_batches, compared, counts, training, progress.prediction)
    losses_of_each = policy_losses(run.models, micro_batches, selectors, counts, training)
    applied, checksums = False, {}
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    for micro, losses in zip(micro_batches, losses_of_each, strict=True):
        sums.add(losses, micro.valid_BTH, micro.batch.sources_BT)
        loss = loss + losses.loss.detach()
        if micro is not micro_batches[-1]:
            backward(run.engine, losses.loss)
        else:
            # A loss that was not finite on any rank makes the step's last gradient NaN, and the engine discards the step.
            finite_or_nan, loss = finite_and_loss(sums.finite, loss)
            backward(run.engine, losses.loss * finite_or_nan)
            checksums = checksums_of(run) if is_check_due(training, progress.step + 1) else {}
        applied = end_micro_step(run.engine)

    sums.add_trunk_gradients(run.engine.module.trunk_gradients, run.world.size)

    # A step that was discarded says why.
    keys = [batch.keys for batch in batches]
    bad = None if applied else describe_bad_numbers(sums.bad_rows, run.engine.module.bad_gradient_rows, keys)
    norm = run.engine.get_global_grad_norm()
    return StepResult(counts, consumed, replaced, sums, loss, norm, rate, applied, bad, checksums)


def advance(progress: Progress, result: StepResult, settings: Settings) -> None:
    """Count a step; its samples are consumed even if it was discarded."""
    progress.step += 1
    progress.samples += settings.data.global_batch
    count_consumed(progress, result.consumed)

    # The schedule and the prediction follow applied steps alone.
    progress.skipped_steps += not result.applied
    progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
    if result.applied and settings.training.selection_pool in SHARED_POOLS:
        progress.prediction = progress.prediction.after(result.sums.thresholds)

    # So do the windows of loss spikes.
    if result.applied:
        progress.losses.add(result.loss)
    if result.applied and result.gradient_norm is not None:
        progress.gradient_norms.add(result.gradient_norm)

    if progress.skipped_in_a_row >= settings.training.max_skipped_steps:
        raise TrainingDivergedError(
            f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, met numbers that were not finite; in the "
            f"last of them {result.bad}. Lower training.learning_rate where it is the policy's, and look at the samples"
        )


def count_consumed(progress: Progress, consumed: Consumed) -> None:
    progress.tokens += consumed.tokens
    progress.corrupt_samples += consumed.damaged
    progress.tokens_by_source = add_up(progress.tokens_by_source, consumed.tokens_by_source)
    progress.samples_by_source = add_up(progress.samples_by_source, consumed.samples_by_source)


def add_up(before: list[int], more: list[int]) -> list[int]:
    """Add two lists of sums; `before` is empty at the start of a run."""
    return [sum(pair) for pair in itertools.zip_longest(before, more, fillvalue=0)]
