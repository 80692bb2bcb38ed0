"""Tracing samples: list which sample reaches which rank in which step, by running the same code that feeds training."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.loading.stream import Stream
from pipeline.storage.location import Location

# Ranks are read one after the other, some steps at a time, so that the loader workers of only one rank run at once.
_ROWS_AT_A_TIME = 2**16


@dataclass(frozen=True)
class Arrival:
    """One sample's arrival. `step` is counted from the start of the run; `shard` and `key` are as in `Batch.keys`."""

    step: int
    rank: int
    shard: str
    key: str


def arrivals(
    location: Location,
    *,
    world_size: int,
    global_batch: int,
    start_sample: int,
    num_steps: int,
    skipped: Sequence[Sequence[int]] = (),
    **sizes: Any,
) -> Iterator[Arrival]:
    """Yield every sample of `num_steps` steps from `start_sample` on, in the order of the global batch's rows.

    Args:
        location: the prepared folder.
        start_sample: rows consumed before the first step, a multiple of G.
        skipped: stretches of rows that the run leaves out (`skipping`), multiples of G.
        sizes: further arguments of `Stream`.

    Raises:
        DataError: as for `Stream`, or a sample is damaged.
        ValueError: `start_sample` is not a multiple of G.
    """
    # One stream a rank, all of the same manifest.
    first = Stream(location, world_size=world_size, rank=0, global_batch=global_batch, **sizes)
    streams = [first.of_rank(rank) for rank in range(world_size)]
    end = start_sample + num_steps * global_batch

    # Read some steps of every rank, then merge them micro-step by micro-step.
    at_a_time = max(1, _ROWS_AT_A_TIME // global_batch) * global_batch
    for start in range(start_sample, end, at_a_time):
        by_rank = [
            [batch.keys for batch in stream.iterate(start, end_sample=min(start + at_a_time, end), skipped=skipped)]
            for stream in streams
        ]
        rows = itertools.count(start)
        for micro_step in zip(*by_rank, strict=True):
            for rank, keys in enumerate(micro_step):
                for name in keys:
                    shard, _, key = name.partition("/")
                    yield Arrival(next(rows) // global_batch, rank, shard, key)
