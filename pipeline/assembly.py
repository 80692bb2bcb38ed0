"""Build a `Run` from a job's settings: open the data, check that it may resume, build the engines.

Errors found here are raised on every rank alike, before an engine is built.
"""

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import ModelSettings, Settings
from pipeline.data.loading.batch import Batch, collate
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.data.loading.mixture import DataSet, held_out_sets, read_joined, sets_of
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.reference_losses import ReaderWithLosses, check_alike
from pipeline.derived import cached_losses, has_selecting_heads, lanes_of, reference_shape, vocab_size_of
from pipeline.micro_step import Models
from pipeline.run import Run
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.deepspeed_json import precision_of, resolve_deepspeed_json
from pipeline.runtime.distributed import World, broadcast_from_first, min_over_ranks
from pipeline.runtime.engine import Engine, build_policy, build_reference, release
from pipeline.runtime.identity import identity_of
from pipeline.runtime.memory import free_bytes, sharding_that_fits
from pipeline.runtime.model_content import ModelFingerprints
from pipeline.runtime.parameters import num_parameters


@dataclass(frozen=True)
class Job:
    """The job that a command starts: its settings, run directory, ranks and device. deepspeed: the JSON's content as given."""

    settings: Settings
    deepspeed: dict[str, Any]
    run_dir: Path
    world: World
    device: torch.device
    allow_changed: bool = False
    from_step: int | None = None

    @cached_property
    def fingerprints(self) -> ModelFingerprints:
        """Fingerprints of the models that the job depends on, each read once a start."""
        return ModelFingerprints(self.world)


def build_run(job: Job, settings: Settings, run_dir: Path, dry: bool = False) -> Run:
    """Open the data, check that the run directory may be resumed with these settings, then build the engines. Collective.

    dry: ignore checkpoints, and initialise a reference randomly if it is still to be trained.

    Raises:
        ConfigError: the run directory holds a checkpoint that these settings may not continue.
        DataError: the data or its cached losses cannot be used.
    """
    settings, config, checkpoints = resolve_settings(job, settings, run_dir)

    # Data.
    reference_sha256 = checkpoints.identity["reference model"]
    sets = with_cached_losses(sets_of(settings.data), settings, config, reference_sha256)
    stream = open_stream(sets, settings, job.world, settings.data.num_workers)
    held_out = [
        HeldOutRows(
            each,
            num_rows=settings.logging.validation_samples,
            micro_batch=settings.data.rows_per_rank,
            rank=job.world.rank,
            world_size=job.world.size,
            access=settings.data.access,
        )
        for each in with_cached_losses(held_out_sets(settings.data), settings, config, reference_sha256)
    ]

    # Refuse before the minutes that building engines takes.
    if not dry:
        checkpoints.check(job.allow_changed)

    first_set = (held_out[0].data, held_out[0].manifest) if held_out else (stream.sets[0], stream.manifests[0])
    fixed_batch = first_row(*first_set, settings)

    # Engines come after all else that may fail, because Python alone does not free them.
    engine, reference = _build_engines(job, settings, config, reference_shape(settings, include_untrained=dry))
    return Run(
        settings=settings,
        world=job.world,
        device=job.device,
        run_dir=run_dir,
        engine=engine,
        models=Models(engine, reference, settings.reference.horizon, dist.group.WORLD),
        stream=stream,
        held_out=held_out,
        checkpoints=checkpoints,
        fixed_batch=fixed_batch,
    )


def first_row(data: DataSet, manifest: Manifest, settings: Settings) -> Batch:
    """Read the first row of a prepared folder, on the first rank for all; a damaged one is a row of padding.

    Its cached losses come along, unless they are damaged: the row is the same with and without them.
    """
    reader = ShardReader(data.location, manifest, settings.data.access)
    try:
        rows = reader.read_many([0], [0])
        if data.losses is not None:
            with closing(ReaderWithLosses(reader, data.losses)) as with_losses:
                scored = with_losses.read_many([0], [0])
            rows = rows if scored[0].damage else scored
        return broadcast_from_first(collate(rows))
    finally:
        reader.close()


def _build_engines(
    job: Job, settings: Settings, config: dict[str, Any], shape: ModelSettings | None
) -> tuple[Engine, Engine | None]:
    """Build the engines of the policy and of a reference of this shape, if any: both or, with the memory freed, neither.

    The reference comes second, because `auto` sharding looks at the memory that the policy leaves.
    """
    policy = build_policy(settings, config)
    try:
        return policy, None if shape is None else build_frozen_reference(job, settings, config, shape)
    except BaseException:
        # The reason is raised even where the policy cannot be freed, as after an error that ends the device's context.
        with suppress(Exception):
            release(policy)
        raise


def build_frozen_reference(job: Job, settings: Settings, config: dict[str, Any], shape: ModelSettings) -> Engine:
    """Build the frozen reference's engine; collective.

    `reference.sharding: auto` replicates the reference if that takes little of the free memory on the fullest rank, which saves
    its all-gathers.
    """
    sharding: str = settings.reference.sharding
    if sharding == "auto":
        needed = num_parameters(shape) * (2 if precision_of(config) == "bfloat16" else 4)
        free = min_over_ranks(free_bytes(job.device, job.world.local_size), job.device)
        sharding = sharding_that_fits(needed, free)
    return build_reference(shape, settings.reference.path, sharding, config, settings.training.compile)


def resolve_settings(job: Job, settings: Settings, run_dir: Path) -> tuple[Settings, dict[str, Any], Checkpoints]:
    """Fill in the settings that depend on the data.

    Returns:
        The settings with lanes and vocab_size set, the resolved DeepSpeed configuration, and the run's checkpoints.
    """
    manifest = read_joined(settings.data)
    settings = settings.with_values(
        data={"lanes": lanes_of(settings)}, model={"vocab_size": vocab_size_of(settings, manifest.vocab_size)}
    )
    config = resolve_deepspeed_json(job.deepspeed, settings, job.world.size)

    # What the models are, by content; a reference that nothing is compared with is not read.
    selects = has_selecting_heads(settings)
    folders = {"reference": settings.reference.path if selects else None, "pretrained": settings.model.pretrained}
    models = {name: None if folder is None else job.fingerprints.content(folder) for name, folder in folders.items()}
    reference_sha256 = None if models["reference"] is None else models["reference"].sha256
    found = [cached_losses(settings, each.location, config, reference_sha256) for each in sets_of(settings.data) if selects]
    cached = [each for each in found if each is not None]
    check_alike(cached)
    identity = identity_of(settings, config, models, [each.manifest for each in cached])

    # To go back is of the job's own run alone, not of a reference that it trains.
    from_step = job.from_step if run_dir == job.run_dir else None
    return settings, config, Checkpoints(run_dir, job.world, identity, settings.checkpoint, from_step)


def open_stream(sets: Sequence[DataSet], settings: Settings, world: World, num_workers: int) -> Stream:
    """Open this rank's stream of rows."""
    return Stream(
        sets,
        lanes=lanes_of(settings),
        global_batch=settings.data.global_batch,
        micro_batch=settings.data.rows_per_rank,
        rank=world.rank,
        world_size=world.size,
        seed=settings.data.seed,
        shuffle_block=settings.data.shuffle_block,
        num_workers=num_workers,
        access=settings.data.access,
        # A rank that raised alone would leave the others waiting in a collective; `handle_damage` raises on all.
        raises=False,
    )


def with_cached_losses(
    sets: Sequence[DataSet], settings: Settings, config: dict[str, Any], reference_sha256: str | None
) -> list[DataSet]:
    """Add to each set its cached losses of that reference, if `reference.cached` is set and a head selects."""
    if not has_selecting_heads(settings):
        return list(sets)
    return [replace(each, losses=cached_losses(settings, each.location, config, reference_sha256)) for each in sets]
