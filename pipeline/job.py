"""A job from its settings to its end: check everything, make what is missing, then train.

Everything that a user can get wrong is found before any compute is spent. What the job makes itself, the built-in
corpus and a reference trained on it, lies under the run directory and is made once: a directory appears by a rename, so
one that is there is complete.
"""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import ConfigError, ModelSettings, Settings, flatten
from pipeline.data.builtin import prepare_builtin
from pipeline.data.manifest import DataError, Manifest, read_manifest
from pipeline.data.order import too_few_samples
from pipeline.data.stream import Stream, check_sizes, default_lanes
from pipeline.data.tokenizer import fingerprint, load_tokenizer
from pipeline.micro_step import Models
from pipeline.model.huggingface import ModelFilesError, read_model_settings, save_model
from pipeline.model.mtp import MTPModel
from pipeline.runtime.checkpoint import Checkpoints, Progress, replace_text
from pipeline.runtime.distributed import World, made_once
from pipeline.runtime.engine import (
    build_policy,
    build_reference,
    gathered,
    read_deepspeed_json,
    release,
    resolve_deepspeed_json,
)
from pipeline.runtime.memory import peak_bytes, reset_peak
from pipeline.runtime.preemption import StopRequest
from pipeline.runtime.reporting import closing_table, read_records
from pipeline.train import Run, advance, train, train_step

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Job:
    """What the command line asked for, and where it runs. deepspeed: the JSON's content."""

    settings: Settings
    deepspeed: dict[str, Any]
    run_dir: Path
    world: World
    device: torch.device
    allow_changed: bool = False


def check_before_start(settings: Settings, deepspeed_json: Path, world: World, problems: Sequence[str] = ()) -> dict[str, Any]:
    """Find everything that is wrong and can be known before the process group exists; returns the JSON's content.

    `problems` were found in the settings before; with any, some settings are stand-ins and only files are looked at.

    Raises:
        ConfigError: all problems of settings, DeepSpeed JSON, sizes, data and reference at once.
    """
    content, found = read_deepspeed_json(deepspeed_json, settings)
    manifests, unreadable = _read_manifests(settings)
    found += unreadable
    if problems:
        raise ConfigError([*problems, *found, *_reference_problems(settings.reference.path, None)])
    first = next(iter(manifests.values()), None)
    for path, manifest in manifests.items():
        found += _manifest_problems(manifest, path, settings, first)
    found += check_sizes(
        lanes=lanes_of(settings),
        global_batch=settings.data.global_batch,
        micro_batch=settings.data.micro_batch,
        world_size=world.size,
        num_workers=settings.data.num_workers,
    )
    found += _model_problems(settings, first)
    if found:
        raise ConfigError(found)
    return content


def run_job(job: Job) -> int:
    """Make what is missing, train, close with a table; returns the exit code."""
    stop = StopRequest(job.run_dir, job.world)
    _say(job, f"run directory {job.run_dir}; {job.world.size} rank{'s' if job.world.size > 1 else ''} on {job.device.type}")
    settings = with_builtin_data(job)
    if settings.reference.path is None and settings.reference.training_steps is not None:
        settings, exit_code = with_trained_reference(job, settings, stop)
        if exit_code:
            return exit_code
    exit_code = train_in(job, settings, job.run_dir, stop)
    if exit_code == 0 and job.world.is_first:
        assert settings.data.path is not None
        names = read_manifest(settings.data.path).source_names
        print("\n" + closing_table(read_records(job.run_dir), job.run_dir, names), flush=True)
    return exit_code


def dry_run(job: Job) -> int:
    """Build everything, run one step, report its peak memory and the token budget. Writes nothing but built-in data."""
    settings = with_builtin_data(job)
    run = build_run(job, settings, job.run_dir, stand_in_reference=True)
    progress = Progress()
    reset_peak(job.device)
    result = train_step(run, run.stream.iterate(0), 0)
    advance(progress, result, settings)
    peaks = torch.tensor(peak_bytes(job.device), dtype=torch.int64, device=job.device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    record = result.sums.record(result.plan.scale_H, run.stream.manifest.source_names or ("",), run.models.group)
    steps, epoch = settings.training.steps, run.stream.manifest.num_tokens
    budget = progress.tokens * steps
    _say(
        job,
        f"dry run: one step on {job.world.size} rank(s), loss {record['loss']:.4f}\n"
        f"  peak memory of the step   {peaks.item() / 2**20:,.0f} MiB on the fullest rank ({_what_is_counted(job.device)})\n"
        f"  token budget              {steps} steps × {progress.tokens:,} tokens = {budget:,} tokens, "
        f"{budget / epoch:.2f} epochs of {epoch:,}\n"
        f"  time                      {result.seconds:.1f} s for this first step, the warm-up included",
    )
    return 0


def with_builtin_data(job: Job) -> Settings:
    """Settings whose data paths are real: the built-in corpus is prepared if it was asked for and is not there."""
    settings = job.settings
    if not settings.data.builtin:
        return settings
    directory = job.run_dir / "data"

    def make() -> None:
        prepare_builtin(directory, settings.data.sequence_length, settings.data.seed, progress=lambda m: _say(job, m))

    made_once(directory, make, job.world)
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
    manifest = read_manifest(directory / "mix")
    problems = [*_manifest_problems(manifest, directory / "mix", settings, None), *_model_problems(settings, manifest)]
    if problems:
        raise ConfigError(problems)
    return settings


def with_trained_reference(job: Job, settings: Settings, stop: StopRequest) -> tuple[Settings, int]:
    """Train the reference with the same code (one head) in RUN/reference/training, export it to RUN/reference."""
    directory = job.run_dir / "reference"
    complete = directory / "config.json"
    if not complete.exists():
        _say(job, f"training a next-token reference for {settings.reference.training_steps} steps")
        one_head = settings.with_values(
            data={"path": settings.reference.training_data},
            model={"num_prediction_heads": 1},
            reference={"training_steps": None, "training_data": None},
            training={"steps": settings.reference.training_steps, "head_weights": None},
        )
        exit_code = train_in(job, one_head, directory / "training", stop, export_to=directory)
        if exit_code:
            return settings, exit_code
    return settings.with_values(reference={"path": directory, "training_steps": None, "training_data": None}), 0


def train_in(job: Job, settings: Settings, run_dir: Path, stop: StopRequest, export_to: Path | None = None) -> int:
    run = build_run(job, settings, run_dir)
    open_run_directory(job, run)
    exit_code = train(run, stop, job.allow_changed)
    if exit_code == 0 and export_to is not None:
        export(run, export_to)
    if export_to is not None:
        release(run.engine)
    return exit_code


def open_run_directory(job: Job, run: Run) -> None:
    """Refuse to continue what is there with other settings, then describe this run in config.yaml and environment.json."""
    run.checkpoints.check(job.allow_changed)
    stream, settings = run.stream, run.settings
    if job.world.is_first:
        _describe_run(job, settings, run.run_dir)
    _say(
        job,
        f"{stream.samples_per_epoch} rows of {settings.data.sequence_length} tokens an epoch ({stream.dropped_per_epoch} left "
        f"over), {settings.training.steps} steps of {settings.data.global_batch} rows",
    )


def build_run(job: Job, settings: Settings, run_dir: Path, stand_in_reference: bool = False) -> Run:
    """Open the data, build the engines. `stand_in_reference` draws a reference that is still to be trained."""
    data_path, validation_path = settings.data.path, settings.data.validation_path
    assert data_path is not None
    manifest = read_manifest(data_path)
    settings = settings.with_values(
        data={"lanes": lanes_of(settings)}, model={"vocab_size": settings.model.vocab_size or manifest.vocab_size}
    )
    config = resolve_deepspeed_json(job.deepspeed, settings, job.world.size)
    group = dist.group.WORLD
    engine = build_policy(settings, config)
    reference_shape = _reference_settings(settings, stand_in_reference)
    reference = None
    if reference_shape is not None:
        reference = build_reference(reference_shape, settings.reference.path, settings.reference.sharding, config)
    identity = flatten(settings) | {
        "data": _fingerprint(data_path / "manifest.json"),
        "reference model": reference and settings.reference.path and _model_fingerprint(settings.reference.path),
        "deepspeed stage": config.get("zero_optimization", {}).get("stage", 0),
        "deepspeed bf16": config.get("bf16", {}).get("enabled", False),
    }
    return Run(
        settings=settings,
        world=job.world,
        device=job.device,
        run_dir=run_dir,
        engine=engine,
        models=Models(policy=engine, reference=reference, group=group),
        stream=open_stream(data_path, settings, job.world, settings.data.num_workers),
        # A validation is short and every worker's start is not: it reads in the training process.
        validation=open_stream(validation_path, settings, job.world, num_workers=0) if validation_path else None,
        checkpoints=Checkpoints(run_dir, job.world, identity, settings.checkpoint.keep),
    )


def open_stream(path: Path, settings: Settings, world: World, num_workers: int) -> Stream:
    return Stream(
        path,
        lanes=lanes_of(settings),
        global_batch=settings.data.global_batch,
        micro_batch=settings.data.micro_batch,
        rank=world.rank,
        world_size=world.size,
        seed=settings.data.seed,
        shuffle_block=settings.data.shuffle_block,
        num_workers=num_workers,
    )


def export(run: Run, directory: Path) -> None:
    """Write the policy as a model directory; config.json appears last, so its presence means that all is there."""
    partial = directory / "export.partial"
    if run.world.is_first:
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    model = run.engine.module
    assert isinstance(model, MTPModel)
    save_model(model, partial, gathered, writes=run.world.is_first)
    if run.world.is_first:
        assert run.settings.data.path is not None
        tokenizer = run.settings.data.path / run.stream.manifest.tokenizer_file
        (directory / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, directory / file.name)
        partial.rmdir()
    dist.barrier()


def lanes_of(settings: Settings) -> int:
    return settings.data.lanes or default_lanes(settings.data.global_batch)


def _reference_settings(settings: Settings, stand_in: bool) -> ModelSettings | None:
    """The shape of the frozen reference: that of its files with the next-token head alone; None for a run without."""
    if settings.reference.path is not None and settings.model.num_prediction_heads > 1:
        return read_model_settings(settings.reference.path).model_copy(update={"num_prediction_heads": 1})
    if stand_in and settings.reference.training_steps is not None:
        return settings.model.model_copy(update={"num_prediction_heads": 1})
    return None


def _read_manifests(settings: Settings) -> tuple[dict[Path, Manifest], list[str]]:
    """The manifests of the data that is named, the training data's first, and what is wrong with those not read."""
    manifests, problems = {}, []
    named = {
        "data.path": settings.data.path,
        "data.validation_path": settings.data.validation_path,
        "reference.training_data": settings.reference.training_data,
    }
    for key, path in named.items():
        try:
            if path is not None:
                manifests[path] = read_manifest(path)
        except DataError as error:
            problems.append(f"{key}: {error}")
    return manifests, problems


def _manifest_problems(found: Manifest, path: Path, settings: Settings, first: Manifest | None) -> Iterator[str]:
    if found.sequence_length != settings.data.sequence_length:
        yield (
            f"data.sequence_length: {settings.data.sequence_length}, but {path} holds rows of {found.sequence_length} "
            "tokens; set the one or prepare the other"
        )
    if first is not None and found.tokenizer_sha256 != first.tokenizer_sha256:
        yield f"{path}: prepared with another tokenizer than the other data of this run; prepare both with the same"
    if found.num_samples < lanes_of(settings):
        yield f"{path}: {too_few_samples(found.num_samples, lanes_of(settings))}"


def _model_problems(settings: Settings, manifest: Manifest | None) -> list[str]:
    """Whether model, reference and pretrained weights fit the data (`manifest` None: not known yet)."""
    problems = []
    needed = manifest.vocab_size if manifest else 0
    if settings.model.vocab_size is not None and settings.model.vocab_size < needed:
        problems.append(
            f"model.vocab_size: {settings.model.vocab_size} is too small for the data's {needed} ids; leave it unset"
        )
    problems += _reference_problems(settings.reference.path, manifest)
    if settings.model.pretrained is not None:
        try:
            found = read_model_settings(settings.model.pretrained)
        except ModelFilesError as error:
            return [*problems, f"model.pretrained: {error}"]
        own = settings.model.model_copy(update={"vocab_size": settings.model.vocab_size or needed or found.vocab_size})
        problems += [
            f"model.{key}: {mine!r}, but {settings.model.pretrained} has {theirs!r}; they must be equal"
            for key, mine, theirs in _shape_differences(own, found)
        ]
    return problems


def _reference_problems(directory: Path | None, manifest: Manifest | None) -> Iterator[str]:
    if directory is None:
        return
    try:
        shape = read_model_settings(directory)
        tokenizer = fingerprint(load_tokenizer(directory / TOKENIZER_FILE))
    except (ModelFilesError, DataError) as error:
        yield f"reference.path: {error}"
        return
    if manifest is None:
        return
    if (shape.vocab_size or 0) < manifest.vocab_size:
        yield f"reference.path: {directory} knows {shape.vocab_size} ids, the data has {manifest.vocab_size}"
    if tokenizer != manifest.tokenizer_sha256:
        yield (
            f"reference.path: the tokenizer of {directory} differs from the one the data was prepared with "
            f"(sha256 of the id-to-token map {tokenizer[:12]}… and {manifest.tokenizer_sha256[:12]}…); prepare the data "
            "with the reference's tokenizer.json"
        )


def _shape_differences(own: ModelSettings, found: ModelSettings) -> Iterator[tuple[str, Any, Any]]:
    filled = [
        shape.model_dump(exclude={"seed", "pretrained", "num_prediction_heads"})
        | {
            "num_key_value_heads": shape.num_key_value_heads or shape.num_attention_heads,
            "head_dim": shape.head_dim or shape.dim // shape.num_attention_heads,
        }
        for shape in (own, found)
    ]
    for key, mine in filled[0].items():
        if mine != filled[1][key] and not (key == "ffn_dim" and mine is None):
            yield key, mine, filled[1][key]


def _describe_run(job: Job, settings: Settings, run_dir: Path) -> None:
    """config.yaml and environment.json: what ran, on what."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.yaml", settings.to_yaml())
    packages = ("torch", "deepspeed", "webdataset", "tokenizers", "safetensors", "numpy")
    environment = {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "host": socket.gethostname(),
        "ranks": job.world.size,
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else platform.processor() or "cpu",
        "threads_per_rank": torch.get_num_threads(),
        "deepspeed_json": job.deepspeed,
    }
    replace_text(run_dir / "environment.json", json.dumps(environment, indent=1) + "\n")


def _git_commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _fingerprint(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _model_fingerprint(directory: Path) -> str:
    """Of a model's files: their sizes, and their first and last MiB. A whole hash of a large model takes minutes."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read())
    return digest.hexdigest()


def _what_is_counted(device: torch.device) -> str:
    return "the allocator's peak" if device.type == "cuda" else "the process's resident memory, Python and libraries included"


def _say(job: Job, text: str) -> None:
    if job.world.is_first:
        print(text, flush=True)
