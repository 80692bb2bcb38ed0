"""Run a job from start to end: prepare what is missing, then train.

A job may first prepare the built-in corpus and train a reference. Both are kept under the run directory and made once: each
appears by a rename, so one that exists is complete.
"""

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.assembly import Job, build_run, resolve_settings
from pipeline.checks import check_data
from pipeline.config import ConfigError, Settings, TrainingSettings
from pipeline.data.corpus.builtin import CORPUS_FILE, prepare_builtin
from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import read_joined
from pipeline.data.tokenizer_files import tokenizer_files
from pipeline.derived import has_selecting_heads
from pipeline.model.export import TextConventions, save_model
from pipeline.model.mtp import MTPModel
from pipeline.planning.plan import plan_memory
from pipeline.planning.report import summary
from pipeline.planning.resolve import resolve_planned_job
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.runtime import heartbeat
from pipeline.runtime.agreement import end_if_signalled
from pipeline.runtime.description import describe_run
from pipeline.runtime.distributed import any_rank, broadcast_from_first, make_once, min_over_ranks
from pipeline.runtime.engine import gathered, release
from pipeline.runtime.events import OF_REFERENCE, begun_and_ended, time_of_start
from pipeline.runtime.logbook import read_records
from pipeline.runtime.memory import free_bytes, total_bytes
from pipeline.runtime.parameters import num_parameters
from pipeline.runtime.preemption import StoppedError, StopRequest
from pipeline.runtime.run_lock import RunLock
from pipeline.runtime.terminal import summary_table
from pipeline.schedule import learning_rate
from pipeline.storage.files import read_whole
from pipeline.storage.whole_file import publish, write_file
from pipeline.train import train

# The reference has one head and selects nothing. With these settings at their defaults, a change of the policy's selection does
# not count as a change of the reference.
_NO_SELECTION = TrainingSettings().model_dump(
    include={
        "k_percent",
        "k_percent_change",
        "selection_warmup_steps",
        "selection_pool",
        "selection_exchange",
        "selection_score",
        "selection_seed",
        "loss_phase",
        "head_weights",
        "head_weights_change",
        "detach_heads",
    }
)


def run_job(job: Job, stop: StopRequest) -> int:
    """Prepare what is missing, train, print the closing table; returns the exit code. Collective.

    Raises:
        ConfigError: another job uses the run directory, or the settings cannot be used.
    """
    lock = RunLock(job.run_dir)
    holder = broadcast_from_first(lock.take() if job.world.is_first else None)
    if holder is not None:
        raise ConfigError([f"--run-dir: {job.run_dir} is in use by {holder}; wait for its end, or choose another one"])
    if job.world.is_first:
        stop.watch(job.run_dir)

    try:
        with _recorded(job, job.run_dir, time_of_start()) as outcome:
            outcome["code"] = exit_code = _make_and_train(job, stop)
    finally:
        lock.release()
    stop.clear()
    return exit_code


def _recorded(job: Job, run_dir: Path, began: float) -> AbstractContextManager[dict[str, Any]]:
    return begun_and_ended(run_dir if job.world.is_first else None, began, job.world.size)


def _make_and_train(job: Job, stop: StopRequest) -> int:
    say(job, f"run directory {job.run_dir}; {job.world.size} rank{'s' if job.world.size > 1 else ''} on {job.device.type}")
    settings = with_builtin_data(job, stop)

    # First the reference, if this job trains one.
    if has_selecting_heads(settings) and settings.reference.path is None and settings.reference.training_steps is not None:
        settings, exit_code = with_trained_reference(job, settings, stop)
        if exit_code:
            return exit_code

    say(job, f"training the policy for {settings.training.steps} steps")
    exit_code = train_in(job, settings, job.run_dir, stop)
    if exit_code == 0 and job.world.is_first:
        names = read_joined(settings.data).source_names
        print("\n" + summary_table(read_records(job.run_dir), job.run_dir, names), flush=True)
    return exit_code


def with_builtin_data(job: Job, stop: StopRequest | None = None) -> Settings:
    """Prepare the built-in corpus if `data.builtin` asks for it; returns the settings with its paths filled in. Collective.

    Raises:
        StoppedError: a signal came meanwhile; what was unfinished is begun anew by the next start.
    """
    settings = job.settings
    if not settings.data.builtin:
        return settings
    directory = job.run_dir / "data"

    def progress(message: str) -> None:
        if stop is not None and stop.is_signalled:
            raise StoppedError
        say(job, message)

    def make() -> None:
        prepare_builtin(directory, settings.data.sequence_length, settings.data.seed, progress=progress)

    # Called even if the corpus exists: it prepares anew if the seed or the sequence length has changed.
    with heartbeat.during("preparing"):
        make_once(directory / CORPUS_FILE, make, job.world, again=True)
    settings = settings.with_values(
        data={
            "path": directory / "mix",
            "builtin": False,
            "validation_path": settings.data.validation_path or directory / "validation",
        },
        reference={}
        if settings.reference.training_steps is None
        else {"training_data": settings.reference.training_data or directory / "library"},
    )
    check_data(settings)
    return settings


def with_trained_reference(job: Job, settings: Settings, stop: StopRequest) -> tuple[Settings, int]:
    """Train the reference with the same code (one head) in RUN/reference/training and export it to RUN/reference.

    Returns:
        The settings with `reference.path` set, and an exit code; if that is not 0 the training was stopped.
    """
    directory = job.run_dir / "reference"
    one_head = settings.with_values(
        data={"path": settings.reference.training_data, "mixture": None},
        model={"num_prediction_heads": 1},
        reference={"training_steps": None, "training_data": None, "cached": None},
        training={"steps": settings.reference.training_steps} | _NO_SELECTION,
    )

    with_reference = settings.with_values(reference={"path": directory, "training_steps": None, "training_data": None})

    # The ranks agree, because training is collective and a shared file system shows a new file to some ranks before others.
    if any_rank(not (directory / "config.json").exists(), job.device):
        say(job, f"training a next-token reference for {settings.reference.training_steps} steps")
        with _recorded(job, job.run_dir / OF_REFERENCE, time.time()) as outcome:
            outcome["code"] = exit_code = train_in(job, one_head, job.run_dir / OF_REFERENCE, stop, export_to=directory)
        if exit_code:
            return settings, exit_code
    else:
        _check_reference(job, one_head, with_reference, directory)
    return with_reference, 0


def _check_reference(job: Job, one_head: Settings, settings: Settings, directory: Path) -> None:
    """Refuse a reference that was trained with other settings than these, if its checkpoints tell, and say what else of the
    run has changed; with `--allow-changed` say that it is used as it is."""
    _, _, checkpoints = resolve_settings(job, one_head, job.run_dir / OF_REFERENCE)
    changed = [f"reference in {directory}: {change}" for change in checkpoints.changed()]
    if changed and not job.allow_changed:
        _, _, checkpoints = resolve_settings(job, settings, job.run_dir)
        remedy = f"remove {directory} to train it again, or pass --allow-changed to use it as it is"
        raise ConfigError([*changed, *map(str, checkpoints.changed())], remedy)
    if changed:
        say(job, "\n  ".join(["the reference is used as it was trained before", *changed]))


def train_in(job: Job, settings: Settings, run_dir: Path, stop: StopRequest, export_to: Path | None = None) -> int:
    """Train in `run_dir`; then export the model to `export_to`, if given, and free it. Returns the exit code.

    Raises:
        StoppedError: a signal came before the first step, when there is nothing to save.
    """
    heartbeat.enter("starting")
    end_if_signalled(stop, job.device)
    run = build_run(job, settings, run_dir)
    end_if_signalled(stop, job.device)
    if job.allow_changed:
        say(job, describe_changes(run))
    describe(job, run)
    exit_code = train(run, stop, job.allow_changed)
    if exit_code == 0 and export_to is not None:
        with heartbeat.during("saving"):
            export(run, export_to)
    if export_to is not None:
        release(run.engine)
    return exit_code


def describe_changes(run: Run) -> str:
    """Say which settings differ from the checkpoint's, and the leap of the learning rate if they change it. Collective."""
    state = run.checkpoints.check(allow_changed=True)
    changes = run.checkpoints.changed()
    if state is None or not changes:
        return "--allow-changed: nothing has changed"

    # The learning rate of the next step, under the former settings and under these.
    training = run.settings.training
    former = {f"training.{key}": key for key in type(training).model_fields}
    before = training.model_copy(update={former[key]: value for key, value in state.identity.items() if key in former})
    applied = Progress.from_json(state.progress).applied_steps
    was, now = learning_rate(before, applied), learning_rate(training, applied)
    leap = [] if was == now else [f"the learning rate of the next step would have been {was:.3g}, and is {now:.3g}"]
    return "\n  ".join(["continuing with changed settings", *map(str, changes), *leap])


def describe(job: Job, run: Run) -> None:
    """Describe the run on disk (config.yaml, environment.json) and on the terminal."""
    if job.world.is_first:
        describe_run(run.run_dir, run.settings, job.deepspeed, job.world, job.device)
        for name, content in _text_of(run)[0].items():
            write_file(run.run_dir / name, content)
    say(job, "\n".join(start_lines(job, run)))


def start_lines(job: Job, run: Run) -> list[str]:
    """Say what is about to run: sizes, the batch's layout over ranks, memory as planned and as free, where things go."""
    stream, settings, data = run.stream, run.settings, run.settings.data
    planned, _ = resolve_planned_job(settings, job.deepspeed, job.world.size, job.device.type == "cuda", total_bytes())
    tokens = data.global_batch * data.sequence_length
    free = min_over_ranks(free_bytes(job.device, job.world.local_size), job.device)
    return [
        f"{num_parameters(settings.model):,} parameters, {settings.model.num_prediction_heads} prediction head(s)",
        f"a step: {job.world.size} rank(s) × {data.micro_batch} rows × {stream.micro_steps} micro-step(s) = "
        f"{data.global_batch} rows of {data.sequence_length} tokens = {tokens:,} tokens; {settings.training.steps} steps",
        f"an epoch: {stream.samples_per_epoch} rows ({stream.dropped_per_epoch} left over)",
        f"memory plan: {summary(plan_memory(planned))}; free now beside the models: {free / 2**30:,.1f} GiB",
        f"records, checkpoints and TensorBoard: {run.run_dir}",
    ]


def export(run: Run, directory: Path) -> None:
    """Export the policy as a model directory; collective. config.json appears last, so its presence means it is complete."""
    partial = directory / "export.partial"
    files, text = _text_of(run) if run.world.is_first else ({}, None)
    if run.world.is_first:
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    model = run.engine.module
    assert isinstance(model, MTPModel)
    save_model(model, partial, gathered, writes=run.world.is_first, text=text)

    if run.world.is_first:
        for name, content in files.items():
            write_file(directory / name, content)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            publish(file, directory / file.name)
        partial.rmdir()
    dist.barrier()


def _text_of(run: Run) -> tuple[dict[str, bytes], TextConventions | None]:
    """The tokenizer files of the run's model and what it expects of text; nothing where the data's tokenizer is of no use."""
    manifest, length = run.stream.manifest, run.settings.data.sequence_length
    content = read_whole(run.stream.sets[0].location / manifest.tokenizer_file, run.settings.data.access)
    bos_id = manifest.bos.id if manifest.bos else None
    try:
        files, pad_id = tokenizer_files(content, manifest.end_of_document_id, manifest.bos is not None, bos_id, length)
    except DataError:
        return {}, None
    return files, TextConventions(length, manifest.end_of_document_id, bos_id, pad_id)


def say(job: Job, text: str) -> None:
    if job.world.is_first:
        print(text, flush=True)
