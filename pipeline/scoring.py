"""Score prepared data with the frozen reference once, on all ranks, and store its losses (`data.shards.reference_losses`).

The model runs as it would in training, in the same precision and on micro-batches of the same shape, so the stored losses are
those of the live reference. The data is divided into pieces, ranges of rows of a shard. In each round every rank scores one
piece, all with the same number of forwards, because the forward of a partitioned reference is collective. Finished pieces
survive a kill.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipeline.assembly import Job, build_frozen_reference, resolve_settings
from pipeline.config import ConfigError, Settings
from pipeline.data.errors import DataError
from pipeline.data.loading.batch import collate, targets_and_valid
from pipeline.data.shards.losses_writer import LossesWriter, Piece
from pipeline.data.shards.manifest import MANIFEST_FILE, read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.reference_losses import STORED_DTYPES, LossesManifest, data_fingerprint
from pipeline.data.shards.sample import Sample
from pipeline.data_checks import data_locations
from pipeline.derived import has_selecting_heads, reference_shape
from pipeline.model.reference import Reference, reference_columns
from pipeline.runtime import heartbeat
from pipeline.runtime.deepspeed_json import precision_of
from pipeline.runtime.distributed import any_rank, broadcast_from_first, gather_over_ranks
from pipeline.runtime.preemption import EXIT_TRY_AGAIN, StopRequest
from pipeline.storage.files import read_whole
from pipeline.storage.location import Location

_SECONDS_BETWEEN_LINES = 10.0


def score(job: Job, settings: Settings, cache: Path, dtype: str, stop: StopRequest) -> int:
    """Score every data set of the settings, validation included; collective.

    Args:
        cache: folder to store the losses in.
        dtype: `float32` or `float16`, of the stored losses.

    Returns:
        The exit code: 0 when finished, `EXIT_TRY_AGAIN` after a request to stop.

    Raises:
        ConfigError: no reference is set, or the model has no heads that select.
        DataError: data is damaged, or `cache` holds losses of another reference.
    """
    problems = scoring_problems(settings, job.run_dir)
    if problems:
        raise ConfigError(problems)
    settings, config, _ = resolve_settings(job, settings, job.run_dir)
    shape = reference_shape(settings)
    assert shape is not None, "there are heads that select, and nothing is cached: the model runs live"

    reference = build_frozen_reference(job, settings, config, shape)
    for location in data_locations(settings):
        if not _score_data_set(job, settings, location, reference, cache, precision_of(config), dtype, stop):
            return EXIT_TRY_AGAIN
    return 0


def scoring_problems(settings: Settings, run_dir: Path) -> list[str]:
    """List what a recipe lacks for scoring, though it may do for training."""
    if not has_selecting_heads(settings):
        return ["model.num_prediction_heads: 1, so nothing selects and there is nothing to score for"]
    if settings.reference.horizon == "own":
        return ["reference.horizon: 'own', which has no reference but the policy itself; there is nothing to score with"]
    if settings.reference.path is not None:
        return []
    problem = "reference.path: not set; name the directory of the reference that is to score the data"
    if settings.reference.training_steps is None:
        return [problem]
    trained = f"reference.path={run_dir / 'reference'} reference.training_steps=null reference.training_data=null"
    return [f"{problem}; the one that this recipe trains is in {run_dir / 'reference'} when it is done: {trained}"]


def _score_data_set(
    job: Job,
    settings: Settings,
    location: Location,
    reference: Reference,
    cache: Path,
    precision: str,
    dtype: str,
    stop: StopRequest,
) -> bool:
    """Score one data set; returns False if a request to stop came first."""
    # The manifest of the losses says which data and reference they belong to.
    manifest, model = read_manifest(location, settings.data.access), settings.reference.path
    assert model is not None
    horizon, num_heads = settings.reference.horizon, settings.model.num_prediction_heads
    losses = LossesManifest.model_validate(
        {
            "data_sha256": data_fingerprint(read_whole(location / MANIFEST_FILE, settings.data.access)),
            "reference_sha256": job.fingerprints.of(model),
            "reference": str(model.absolute()),
            "precision": precision,
            "horizon": horizon,
            "dtype": dtype,
            "sequence_length": manifest.sequence_length,
            "columns": num_heads if horizon == "matched" else 1,
        }
    )

    # What is there already, by content: the ranks share the reading.
    writer, world = LossesWriter(cache, losses, manifest), job.world
    is_finished, failure = broadcast_from_first(_begin(writer) if world.is_first else None)
    if failure is not None:
        raise _agreed(failure)
    if is_finished:
        damaged = sorted(itertools.chain.from_iterable(gather_over_ranks(writer.damaged(world.rank, world.size))))
        if damaged:
            raise _agreed(
                f"{writer.folder}: the losses of {', '.join(damaged[:4])} are damaged; remove the folder and score again"
            )
        _say(job, f"{location}: scored already, in {writer.folder}")
        return True
    missing = sorted(itertools.chain.from_iterable(gather_over_ranks(writer.missing(world.rank, world.size))))

    # One piece per rank and round.
    reader = ShardReader(location, manifest, settings.data.access)
    started = last_line = time.monotonic()
    for first in range(0, len(missing), world.size):
        # In the last round some ranks may have none left: they score the last piece with its owner and write nothing.
        mine = missing[min(first + world.rank, len(missing) - 1)]
        heartbeat.enter("scoring")
        samples, damage = _read(reader, mine)
        if any_rank(damage is not None, job.device):
            raise DataError(damage or "another rank met damaged data, which it names")
        num_rows = _rows_per_round(missing, first, world.size)
        scored = []
        for losses_BTC in _score_rows(
            reference, horizon, num_heads, settings.data.rows_per_rank, job.device, samples, num_rows
        ):
            scored.append(losses_BTC)
            heartbeat.go_on()
            if any_rank(stop.is_overdue, job.device):
                _say(job, f"{location}: stopped on request within a piece; the same command continues from what was saved")
                return False
        losses_NTC = np.concatenate(scored)[: len(samples)]
        found = _not_finite(losses_NTC, dtype, samples)
        if any_rank(found is not None, job.device):
            raise _first_of_ranks(found, location, model)
        if first + world.rank < len(missing):
            writer.write(mine, losses_NTC)
        if any_rank(stop.is_requested, job.device):
            _say(job, f"{location}: stopped on request; the same command continues from what was saved")
            return False
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line, done = time.monotonic(), min(first + world.size, len(missing))
            left = (last_line - started) / done * (len(missing) - done)
            _say(job, f"{location}: {done:,} of {len(missing):,} pieces scored, about {left:,.0f} s left")

    # All pieces are written: join them into one file per shard, then write the manifest, which marks the set as finished.
    dist.barrier()
    for shard in range(world.rank, len(manifest.shards), world.size):
        writer.join(shard)
    dist.barrier()
    if world.is_first:
        writer.finish()
    dist.barrier()
    _say(job, f"{location}: reference losses of {manifest.num_samples:,} rows in {writer.folder}")
    return True


def _begin(writer: LossesWriter) -> tuple[bool, str | None]:
    """(true if the set is finished, failure). Failures are returned, so that all ranks can raise."""
    try:
        return writer.begin(), None
    except DataError as error:
        return False, str(error)


def _agreed(message: str) -> DataError:
    error = DataError(message)
    error.agreed = True
    return error


def _not_finite(losses_NTC: np.ndarray, dtype: str, samples: list[Sample]) -> str | None:
    """Describe the first loss that is not finite as it would be stored, by sample and token; None if all are."""
    with np.errstate(over="ignore"):
        bad = np.argwhere(~np.isfinite(losses_NTC.astype(STORED_DTYPES[dtype])))
    if not len(bad):
        return None
    row, token, column = bad[0]
    loss = losses_NTC[row, token, column]
    kind = f"is too large for {dtype} (--dtype float32 holds it)" if np.isfinite(loss) else "is not finite"
    return f"that {kind} in sample {samples[row].key}, token {token}: {loss} ({len(bad):,} such losses in its piece)"


def _first_of_ranks(found: str | None, location: Location, model: Path) -> DataError:
    """The error about losses that are not finite, which names what the first rank that met one has found; collective."""
    named = next(each for each in gather_over_ranks(found) if each is not None)
    return _agreed(
        f"{location}: the reference {model} gives a loss {named}; nothing of this piece was stored. Look "
        "at the sample, and at the reference and its precision"
    )


def _read(reader: ShardReader, piece: Piece) -> tuple[list[Sample], str | None]:
    """(samples of a piece, the first damage among them)."""
    shard, first, end = piece
    samples = reader.read_many([shard] * (end - first), list(range(first, end)))
    return samples, next((sample.damage for sample in samples if sample.damage is not None), None)


def _rows_per_round(missing: list[Piece], first: int, world_size: int) -> int:
    """Rows that every rank scores in the round that starts at piece `first`: as many as its largest piece has."""
    return max(end - begin for _, begin, end in missing[first : first + world_size])


def _score_rows(
    reference: Reference,
    horizon: str,
    num_heads: int,
    micro_batch: int,
    device: torch.device,
    samples: list[Sample],
    num_rows: int,
) -> Iterator[np.ndarray]:
    """Yield the losses of one micro-batch after the other, float32 [B, T, C], at least `num_rows` rows in all.

    The last sample is repeated to fill the last batch, so that every batch has the shape that the live reference sees.
    """
    for start in range(0, num_rows, micro_batch):
        rows = [samples[min(row, len(samples) - 1)] for row in range(start, start + micro_batch)]
        batch = collate(rows).to(device)
        targets_BTH, valid_BTH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, num_heads)
        inputs = batch.tokens_BT, batch.document_ids_BT, targets_BTH, valid_BTH
        num_valid_H = batch.num_valid(num_heads).numpy().sum(0).tolist()
        columns_BTC = reference_columns(reference, horizon, *inputs, spans=batch.spans, num_valid_H=num_valid_H)
        yield columns_BTC.float().cpu().numpy()


def _say(job: Job, text: str) -> None:
    if job.world.is_first:
        print(text, flush=True)
