"""Run a job from start to end: prepare what is missing, then train.

A job may first prepare the built-in corpus and train a reference. Both are kept under the run directory and made once: each
appears by a rename, so one that exists is complete.
"""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.assembly import Job, build_run, resolve_settings
from pipeline.checks import check_data
from pipeline.config import ConfigError, ModelSettings, Settings, TrainingSettings
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
from pipeline.runtime.description import describe_run
from pipeline.runtime.distributed import any_rank, broadcast_from_first, make_once, max_over_ranks
from pipeline.runtime.engine import gathered, num_parameters, release
from pipeline.runtime.logbook import read_records
from pipeline.runtime.memory import current_bytes, peak_bytes, reset_peak, total_bytes
from pipeline.runtime.preemption import StopRequest
from pipeline.runtime.run_lock import RunLock
from pipeline.runtime.terminal import summary_table
from pipeline.schedule import learning_rate
from pipeline.storage.files import read_whole
from pipeline.storage.whole_file import publish, write_file
from pipeline.train import advance, fetch_step, train, train_step

# The reference has one head and selects nothing. With these settings at their defaults, a change of the policy's selection does
# not count as a change of the reference.
_NO_SELECTION = TrainingSettings().model_dump(
    include={"k_percent", "selection_pool", "selection_exchange", "selection_score", "selection_seed", "loss_phase"}
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
        exit_code = _make_and_train(job, stop)
    finally:
        lock.release()
    stop.clear()
    return exit_code


def _make_and_train(job: Job, stop: StopRequest) -> int:
    _say(job, f"run directory {job.run_dir}; {job.world.size} rank{'s' if job.world.size > 1 else ''} on {job.device.type}")
    settings = with_builtin_data(job)

    # First the reference, if this job trains one.
    if has_selecting_heads(settings) and settings.reference.path is None and settings.reference.training_steps is not None:
        settings, exit_code = with_trained_reference(job, settings, stop)
        if exit_code:
            return exit_code

    _say(job, f"training the policy for {settings.training.steps} steps")
    exit_code = train_in(job, settings, job.run_dir, stop)
    if exit_code == 0 and job.world.is_first:
        names = read_joined(settings.data).source_names
        print("\n" + summary_table(read_records(job.run_dir), job.run_dir, names), flush=True)
    return exit_code


def dry_run(job: Job) -> int:
    """Build everything, run one step, report its peak memory and the token budget. Writes nothing but built-in data."""
    # Build, then one step under measurement. The plan knows nothing of what Python and libraries take, so that is left out.
    settings = with_builtin_data(job)
    libraries = current_bytes(job.device)
    run = build_run(job, settings, job.run_dir, dry=True)
    progress = Progress()
    reset_peak(job.device)
    started = time.perf_counter()
    result = train_step(run, fetch_step(run, run.stream.iterate(0), step=0, first_sample=0), progress)
    advance(progress, result, settings)
    peak = max_over_ranks(peak_bytes(job.device) - libraries, job.device)
    record = result.sums.record(result.counts.scale_H, run.stream.manifest.source_names or ("",), run.models.group)
    seconds = time.perf_counter() - started

    # Report.
    planned, _ = resolve_planned_job(run.settings, job.deepspeed, job.world.size, job.device.type == "cuda", total_bytes())
    steps, epoch, data = settings.training.steps, run.stream.manifest.num_tokens, settings.data
    budget = progress.tokens * steps
    _say(
        job,
        f"dry run: one step on {job.world.size} rank(s), loss {math.nan if record['loss'] is None else record['loss']:.4f}\n"
        f"  parameters                {num_parameters(run.settings.model):,} of the policy\n"
        f"  reference                 {_reference_of(run, planned.reference)}\n"
        f"  a step                    {data.global_batch} rows = {run.stream.micro_steps} micro-step(s) × "
        f"{job.world.size} rank(s) × {data.micro_batch} rows\n"
        f"  peak memory of the step   {peak / 2**20:,.0f} MiB on the fullest rank ({_memory_source(job.device)})\n"
        f"  memory plan               {summary(plan_memory(planned))}; what libraries take is in neither\n"
        f"  token budget              {steps} steps × {progress.tokens:,} tokens = {budget:,} tokens, "
        f"{budget / epoch:.2f} epochs of {epoch:,}\n"
        f"  time                      {seconds:.1f} s for this first step, the warm-up included",
    )
    return 0


def _reference_of(run: Run, shape: ModelSettings | None) -> str:
    """Describe the reference for a dry run. shape: the live one's; None without it."""
    if shape is None:
        return "none" if run.settings.reference.cached is None else f"cached losses in {run.settings.reference.cached}"
    size = f"{num_parameters(shape):,} parameters"
    if run.settings.reference.path is None:
        return f"{size} of random weights, a stand-in: the reference is yet to be trained, so losses and selection mean nothing"
    return f"{size}, {run.settings.reference.path}"


def with_builtin_data(job: Job) -> Settings:
    """Prepare the built-in corpus if `data.builtin` asks for it; returns the settings with its paths filled in."""
    settings = job.settings
    if not settings.data.builtin:
        return settings
    directory = job.run_dir / "data"

    def make() -> None:
        prepare_builtin(directory, settings.data.sequence_length, settings.data.seed, progress=lambda m: _say(job, m))

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
        training={"steps": settings.reference.training_steps, "head_weights": None} | _NO_SELECTION,
    )

    with_reference = settings.with_values(reference={"path": directory, "training_steps": None, "training_data": None})

    # The ranks agree, because training is collective and a shared file system shows a new file to some ranks before others.
    if any_rank(not (directory / "config.json").exists(), job.device):
        _say(job, f"training a next-token reference for {settings.reference.training_steps} steps")
        exit_code = train_in(job, one_head, directory / "training", stop, export_to=directory)
        if exit_code:
            return settings, exit_code
    else:
        _check_reference(job, one_head, with_reference, directory)
    return with_reference, 0


def _check_reference(job: Job, one_head: Settings, settings: Settings, directory: Path) -> None:
    """Refuse a reference that was trained with other settings than these, if its checkpoints tell, and say what else of the
    run has changed; with `--allow-changed` say that it is used as it is."""
    _, _, checkpoints = resolve_settings(job, one_head, directory / "training")
    changed = [f"reference in {directory}: {change}" for change in checkpoints.changed()]
    if changed and not job.allow_changed:
        _, _, checkpoints = resolve_settings(job, settings, job.run_dir)
        remedy = f"remove {directory} to train it again, or pass --allow-changed to use it as it is"
        raise ConfigError([*changed, *map(str, checkpoints.changed())], remedy)
    if changed:
        _say(job, "\n  ".join(["the reference is used as it was trained before", *changed]))


def train_in(job: Job, settings: Settings, run_dir: Path, stop: StopRequest, export_to: Path | None = None) -> int:
    """Train in `run_dir`; then export the model to `export_to`, if given, and free it. Returns the exit code."""
    heartbeat.enter("starting")
    run = build_run(job, settings, run_dir)
    if job.allow_changed:
        _say(job, describe_changes(run))
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
    stream, settings = run.stream, run.settings
    if job.world.is_first:
        describe_run(run.run_dir, settings, job.deepspeed, job.world, job.device)
        for name, content in _text_of(run)[0].items():
            write_file(run.run_dir / name, content)
    _say(
        job,
        f"{stream.samples_per_epoch} rows of {settings.data.sequence_length} tokens an epoch ({stream.dropped_per_epoch} left "
        f"over), {settings.training.steps} steps of {settings.data.global_batch} rows",
    )


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


def _memory_source(device: torch.device) -> str:
    return "the allocator's peak" if device.type == "cuda" else "resident memory, less what it was before the models were built"


def _say(job: Job, text: str) -> None:
    if job.world.is_first:
        print(text, flush=True)
