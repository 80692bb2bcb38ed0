"""Score prepared data with the frozen reference once, on all ranks, and store its losses (`data.shards.reference_losses`).

The model runs as it would in training, in the same precision and on micro-batches of the same shape, so the stored losses are
those of the live reference. The data is divided into pieces, ranges of rows of a shard. In each round every rank scores one
piece, all with the same number of forwards, because the forward of a partitioned reference is collective. Finished pieces
survive a kill.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
from pipeline.time_left import TimeLeft


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
        scorer = DataSetScorer(job, settings, location, reference, cache, precision_of(config), dtype)
        if not scorer.run(stop):
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


class DataSetScorer:
    """The scoring of one data set, on all ranks together.

    dtype: of the stored losses, `float32` or `float16`. precision: of the reference's weights.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        location: Location,
        reference: Reference,
        cache: Path,
        precision: str,
        dtype: str,
    ):
        assert settings.reference.path is not None
        self.job, self.settings, self.location, self.reference, self.dtype = job, settings, location, reference, dtype
        self.model, self.horizon = settings.reference.path, settings.reference.horizon
        self.num_heads = settings.model.num_prediction_heads
        self.manifest = read_manifest(location, settings.data.access)
        self.reader = ShardReader(location, self.manifest, settings.data.access)
        self.writer = LossesWriter(cache, self._losses_manifest(precision), self.manifest)

    def _losses_manifest(self, precision: str) -> LossesManifest:
        """Describe the losses: the data and the reference that they belong to."""
        return LossesManifest.model_validate(
            {
                "data_sha256": data_fingerprint(read_whole(self.location / MANIFEST_FILE, self.settings.data.access)),
                "reference_sha256": self.job.fingerprints.of(self.model),
                "reference": str(self.model.absolute()),
                "precision": precision,
                "horizon": self.horizon,
                "dtype": self.dtype,
                "sequence_length": self.manifest.sequence_length,
                "columns": self.num_heads if self.horizon == "matched" else 1,
            }
        )

    def run(self, stop: StopRequest) -> bool:
        """Score what is missing; returns False if a request to stop came first. Collective."""
        if self._is_finished():
            _say(self.job, f"{self.location}: scored already, in {self.writer.folder}")
            return True

        world = self.job.world
        missing = sorted(itertools.chain.from_iterable(gather_over_ranks(self.writer.missing(world.rank, world.size))))
        time_left = TimeLeft(len(missing), "pieces scored")
        for first in range(0, len(missing), world.size):
            if not self._score_round(missing, first, stop):
                return False
            line = time_left.line(min(first + world.size, len(missing)))
            if line is not None:
                _say(self.job, f"{self.location}: {line}")
        self._finish()
        return True

    def _is_finished(self) -> bool:
        """Look whether all losses are there already, by their content; the ranks share the reading."""
        world = self.job.world
        is_finished, failure = broadcast_from_first(_begin(self.writer) if world.is_first else None)
        if failure is not None:
            raise _agreed(failure)
        if not is_finished:
            return False
        damaged = sorted(itertools.chain.from_iterable(gather_over_ranks(self.writer.damaged(world.rank, world.size))))
        if damaged:
            raise _agreed(
                f"{self.writer.folder}: the losses of {', '.join(damaged[:4])} are damaged; remove the folder and score again"
            )
        return True

    def _score_round(self, missing: list[Piece], first: int, stop: StopRequest) -> bool:
        """Score and store one piece a rank, from piece `first` on; returns False if a request to stop came."""
        job, world = self.job, self.job.world
        # In the last round some ranks may have none left: they score the last piece with its owner and write nothing.
        mine = missing[min(first + world.rank, len(missing) - 1)]
        heartbeat.enter("scoring")
        samples, damage = _read(self.reader, mine)
        if any_rank(damage is not None, job.device):
            raise DataError(damage or "another rank met damaged data, which it names")

        scored = []
        for losses_BTC in self._score_rows(samples, _rows_per_round(missing, first, world.size)):
            scored.append(losses_BTC)
            heartbeat.go_on()
            if any_rank(stop.is_overdue, job.device):
                _say(job, f"{self.location}: stopped on request within a piece; the same command continues from what was saved")
                return False

        losses_NTC = np.concatenate(scored)[: len(samples)]
        found = _not_finite(losses_NTC, self.dtype, samples)
        if any_rank(found is not None, job.device):
            raise _first_of_ranks(found, self.location, self.model)
        if first + world.rank < len(missing):
            self.writer.write(mine, losses_NTC)

        if any_rank(stop.is_requested, job.device):
            _say(job, f"{self.location}: stopped on request; the same command continues from what was saved")
            return False
        return True

    def _score_rows(self, samples: list[Sample], num_rows: int) -> Iterator[np.ndarray]:
        """Yield the losses of one micro-batch after the other, float32 [B, T, C], at least `num_rows` rows in all.

        The last sample is repeated to fill the last batch, so that every batch has the shape that the live reference sees.
        """
        micro_batch = self.settings.data.rows_per_rank
        for start in range(0, num_rows, micro_batch):
            rows = [samples[min(row, len(samples) - 1)] for row in range(start, start + micro_batch)]
            batch = collate(rows).to(self.job.device)
            targets_BTH, valid_BTH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, self.num_heads)
            inputs = batch.tokens_BT, batch.document_ids_BT, targets_BTH, valid_BTH
            num_valid_H = batch.num_valid(self.num_heads).numpy().sum(0).tolist()
            columns_BTC = reference_columns(self.reference, self.horizon, *inputs, spans=batch.spans, num_valid_H=num_valid_H)
            yield columns_BTC.float().cpu().numpy()

    def _finish(self) -> None:
        """Join the pieces into one file per shard, then write the manifest, which marks the set as finished."""
        world = self.job.world
        dist.barrier()
        for shard in range(world.rank, len(self.manifest.shards), world.size):
            self.writer.join(shard)
        dist.barrier()
        if world.is_first:
            self.writer.finish()
        dist.barrier()
        _say(self.job, f"{self.location}: reference losses of {self.manifest.num_samples:,} rows in {self.writer.folder}")


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


def _say(job: Job, text: str) -> None:
    if job.world.is_first:
        print(text, flush=True)
