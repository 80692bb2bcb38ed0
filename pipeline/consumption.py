"""Count the data that a step consumed over all ranks (tokens and samples by source, padding, damage) and react to damage.

The counts travel in the all-reduce that counts a step's pairs, so they cost no collective of their own. Every rank learns at
the same point whether any rank met damage, so either all continue or all raise the same message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.row_digest import joined, parts, sample_digest
from pipeline.data.loading.skipping import position_of
from pipeline.data.loading.stream import Stream
from pipeline.data_settings import DataSettings


@dataclass(frozen=True)
class Consumed:
    """Counts of one step's data, summed over ranks and micro-steps.

    tokens: without padding.
    positions: with padding.
    damaged: rows replaced by padding.
    failed: micro-batches that could not be read.
    digest: of the samples in their rows (`row_digest`), the same on any number of ranks.
    tokens_by_source, samples_by_source: in the order of the manifest's sources; a sample counts for each source in it.
    """

    tokens: int
    positions: int
    damaged: int
    failed: int
    digest: int
    tokens_by_source: list[int]
    samples_by_source: list[int]

    @classmethod
    def of(cls, counts: Sequence[int]) -> "Consumed":
        """Unpack the sum over ranks of the vectors that `count` returns."""
        tokens, positions, damaged, failed, high, low, *by_source = counts
        num_sources = len(by_source) // 2
        of_sources = by_source[:num_sources], by_source[num_sources:]
        return cls(tokens, positions, damaged, failed, joined(high, low), *of_sources)


def count(batches: Sequence[Batch], num_sources: int, first_rows: Sequence[int]) -> Tensor:
    """Count this rank's batches: int64 [6 + 2 · num_sources] on the host, in the order of `Consumed`, the digest as
    two numbers. first_rows: the number of each batch's first row in the order of the run."""
    tokens_S, samples_S = np.zeros((2, num_sources), np.int64)
    for batch in batches:
        tokens_BS = np.zeros((len(batch.keys), num_sources), np.int64)
        np.add.at(tokens_BS, (batch.documents.rows_D, batch.documents.sources_D), batch.documents.lengths_D)
        tokens_S += tokens_BS.sum(0)
        samples_S += (tokens_BS > 0).sum(0)
    positions = sum(batch.tokens_BT.numel() for batch in batches)
    damaged = sum(len(batch.damage) for batch in batches)
    failed = sum(batch.failure is not None for batch in batches)
    rows = [first + np.arange(len(batch.keys)) for batch, first in zip(batches, first_rows, strict=True)]
    digest = parts(sample_digest(np.concatenate(rows), np.concatenate([batch.numbers_B for batch in batches])))
    return torch.from_numpy(np.concatenate([[tokens_S.sum(), positions, damaged, failed], digest, tokens_S, samples_S]))


def handle_damage(consumed: Consumed, batches: Sequence[Batch], settings: DataSettings, before: int) -> list[str]:
    """React to damaged samples of a step as `data.on_corrupt` says. Collective if there are any.

    Args:
        consumed: the step's counts over all ranks.
        batches: this rank's batches of the step.
        before: damaged samples that the run met earlier.

    Returns:
        A message for each sample that was replaced by padding, over all ranks.

    Raises:
        DataError: on all ranks alike, if `data.on_corrupt` is `error`, if there are more than `data.max_corrupt` damaged
            samples, or if data could not be read at all.
    """
    if not consumed.damaged and not consumed.failed:
        return []

    # `consumed` is the same on every rank, so all ranks get here together.
    own = [message for batch in batches for message in batch.damage]
    damage = [message for messages in _from_all_ranks(own) for message in messages]
    failures = list(filter(None, _from_all_ranks(next((batch.failure for batch in batches if batch.failure), None))))
    if failures:
        raise _agreed(failures[0])

    if settings.on_corrupt == "error":
        more = f" ({len(damage) - 1} more in this step)" if len(damage) > 1 else ""
        raise _agreed(f"{damage[0]}{more}; or train with data.on_corrupt=skip, which puts a row of padding in its place")
    total = before + consumed.damaged
    if total > settings.max_corrupt:
        raise _agreed(f"{total} damaged samples, more than data.max_corrupt = {settings.max_corrupt}; the last: {damage[-1]}")
    return damage


def data_metrics(stream: Stream, samples: int, progress: Any, consumed: Consumed) -> dict[str, float | int]:
    """Metrics of the data.

    samples: samples consumed so far. progress: the run's counters. consumed: the counts of the last step.
    """
    # An epoch is over when its rows are, also those that were left out.
    position = position_of(samples, progress.skipped)
    record: dict[str, float | int] = {
        "data_epoch": position / stream.samples_per_epoch,
        "data_padding_share": 1 - consumed.tokens / consumed.positions,
        "corrupt_samples": progress.corrupt_samples,
    }
    if len(stream.sets) > 1:
        counted = zip(stream.sets, stream.order.orders, stream.order.consumed(position), strict=True)
        for number, (each, order, rows) in enumerate(counted):
            left_out = _left_out(stream, number, position, progress.skipped)
            record[f"data_epoch_set_{each.name}"] = rows / order.samples_per_epoch
            record[f"data_samples_set_{each.name}"] = rows - left_out
    for number, name in enumerate(stream.manifest.source_names):
        record[f"data_tokens_source_{name}"] = progress.tokens_by_source[number]
        record[f"data_samples_source_{name}"] = progress.samples_by_source[number]
    return record


def _left_out(stream: Stream, number: int, position: int, skipped: Sequence[Sequence[int]]) -> int:
    """Count the rows of a set that were left out before `position`."""
    before = [stretch for stretch in skipped if stretch[0] < position]
    return sum(stream.order.consumed(end)[number] - stream.order.consumed(start)[number] for start, end in before)


def _agreed(message: str) -> DataError:
    """An error that every rank raises alike; the command line prints it once."""
    error = DataError(message)
    error.agreed = True
    return error


def _from_all_ranks(value: Any) -> list[Any]:
    """All-gather an object: every rank's `value`, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
