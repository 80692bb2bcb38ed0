"""The answer to a loss spike: back to a checkpoint from before it, and on without the samples round it.

PaLM's training did so by hand (arXiv 2204.02311): back to about 100 steps before the spike, and on without the next 200 to 500
batches, after which no spike came at the same place. The same batches gave none from another checkpoint, so that they were not
bad by themselves.

What a return comes to does not depend on which checkpoint it loads: the steps from there to the samples that are left out are
made again as they were. Nor need anything be remembered of it before the next checkpoint: a run that is killed until then meets
the same spike again, with the same score, and decides the same.
"""

from collections.abc import Callable

from pipeline.config import TrainingSettings
from pipeline.data.loading.skipping import with_stretch
from pipeline.progress import Progress
from pipeline.run import Run, StepResult
from pipeline.runtime import heartbeat
from pipeline.runtime.checkpoint.state import HeldOut
from pipeline.runtime.non_finite import TrainingDivergedError


def has_spiked(progress: Progress, result: StepResult, training: TrainingSettings) -> bool:
    """Return whether the loss of the step that `progress` has just counted is a spike to go back from."""
    if training.rollback_on_spike is None or not result.applied:
        return False
    score = progress.losses.score()
    return score is not None and score > training.rollback_on_spike


def first_to_skip(progress: Progress, training: TrainingSettings) -> int:
    """The steps before the first one that a spike now would leave out. What lay before an earlier spike's was sound."""
    return max(progress.step - training.rollback_steps, progress.returned_to)


def go_back(run: Run, progress: Progress, say: Callable[[str], None], held_out: Callable[[], HeldOut]) -> Progress | None:
    """Load a checkpoint from before the loss spike that `progress` has come to. Collective.

    Returns:
        The progress to go on from; None, and nothing is done, where there is no checkpoint early enough.

    Raises:
        TrainingDivergedError: the run has gone back `training.max_rollbacks` times already.
        ConfigError: no checkpoint that is early enough is sound.
    """
    training, num_rows = run.settings.training, run.settings.data.global_batch
    first = first_to_skip(progress, training)
    spike = f"step {progress.step}: loss spike, {progress.losses.score():.1f} standard deviations above the steps before it"
    if progress.rollbacks >= training.max_rollbacks:
        raise TrainingDivergedError(
            f"{spike}, after {progress.rollbacks} rollbacks (training.max_rollbacks). Lower training.learning_rate, look at "
            f"the samples, or raise training.rollback_on_spike. {ways_back(run.checkpoints.steps())}"
        )

    # Load, then tell the progress what was decided.
    with heartbeat.during("starting"):
        returned = run.checkpoints.go_back(run.engine, first, held_out)
    if returned is None:
        say(f"{spike}; the run goes on, because there is no checkpoint of step {first} or before")
        return None
    returned.skipped = with_stretch(progress.skipped, first * num_rows, training.rollback_skip_steps * num_rows)
    returned.rollbacks, returned.returned_to = progress.rollbacks + 1, first
    say(
        f"{spike}; back to step {returned.step}, and after step {first} without the next {training.rollback_skip_steps} steps' "
        f"samples (rollback {returned.rollbacks} of at most {training.max_rollbacks})"
    )
    return returned


def ways_back(steps: list[int]) -> str:
    """Say which checkpoints are sound after a divergence, and how to go on from one."""
    if not steps:
        return "There is no checkpoint yet"
    there = ", ".join(map(str, steps))
    return f"Checkpoints hold finite numbers alone: there are steps {there}; continue with --from-step N to go back to one"
