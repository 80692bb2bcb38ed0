"""The stream of one rank: its micro-batches from any position of the run.

The position of the whole job is one integer, samples consumed; the row at each position is a pure function of it (`order`,
`mixture`). This module divides the reading among ranks and workers.

Ranks. A *round* is one sample of each of the L lanes, and a step of G rows is G / L rounds. Micro-step a of a step has the
rows [a·R·B, (a+1)·R·B), of which rank r has a·R·B + r·B + [0, B). L is a multiple of R·B, so each lane is read by one rank as
long as the number of ranks stays the same.

Workers. A rank's lanes are divided among its DataLoader workers, which own lanes and not batches. Each worker yields chunks of
its lanes' rounds, the DataLoader returns the workers' chunks in turn, and merged they are the rank's rows in order. The number
of workers changes nothing but speed. Chunks travel as numpy arrays through a pipe, not as tensors through /dev/shm, which
containers keep small.

Errors. In training, all ranks must go on together until they have agreed to stop. A damaged sample is therefore replaced by a
row of padding with a message, and data that cannot be reached by such rows without end. Elsewhere errors are raised.
"""

import copy
import itertools
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch, blank_batch, collate
from pipeline.data.loading.lane_reader import LaneRounds, RoundsChunk, merge_chunks, rank_lanes
from pipeline.data.loading.mixture import DataSet, join, order_of
from pipeline.data.loading.order import default_lanes
from pipeline.data.loading.sizes import check_sizes
from pipeline.data.loading.skipping import RowOrder, without_rows
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.sample import Sample
from pipeline.storage.files import DIRECT, Access
from pipeline.storage.location import Location, Url

__all__ = ["Stream", "check_sizes", "default_lanes", "rank_lanes"]

Rounds = Generator[list[Sample], None, None]
"""A rank's samples, those of a few whole rounds at a time, in the order of the rows."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stream:
    """One rank's rows of a data set or a mixture, as an iterator of micro-batches that can start at any step.

    Args:
        data: the prepared folder, or the sets of a mixture.
        lanes: L.
        global_batch: G, rows of a step over all ranks.
        micro_batch: B, rows of a rank in a micro-step.
        rank: of this process.
        world_size: R, the number of ranks.
        seed: of the order; fixed for the life of a run.
        shuffle_block: samples shuffled together; fixed for the life of a run.
        num_workers: DataLoader processes; 0 reads in this process.
        access: to data that is not on this machine.
        raises: if true, `iterate` raises an error for damaged samples and unreachable data. If false, the rows concerned are
            padding, and `Batch.damage` and `Batch.failure` have the messages.

    Raises:
        DataError: a folder is not a prepared one, or the sizes do not fit (all problems in one message).
    """

    def __init__(
        self,
        data: Location | Sequence[DataSet],
        *,
        lanes: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_block: int,
        num_workers: int = 0,
        access: Access = DIRECT,
        raises: bool = True,
    ) -> None:
        self.sets = [DataSet(data)] if isinstance(data, Path | Url) else list(data)
        self.manifests = [read_manifest(each.location, access) for each in self.sets]
        self.manifest, self.source_maps = join(self.manifests, self.sets)

        # Refuse sizes that do not fit together.
        problems = check_sizes(
            lanes=lanes,
            global_batch=global_batch,
            micro_batch=micro_batch,
            world_size=world_size,
            num_workers=num_workers,
            num_samples=min(manifest.num_samples for manifest in self.manifests),
        )
        if problems:
            raise DataError("\n".join(problems))
        assert 0 <= rank < world_size
        assert shuffle_block >= 1

        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.access = access
        self.raises = raises
        self.order = order_of(self.manifests, self.sets, lanes=lanes, seed=seed, shuffle_block=shuffle_block)

    def of_rank(self, rank: int) -> "Stream":
        """Make the stream of another rank, without reading any manifest again."""
        assert 0 <= rank < self.world_size
        other = copy.copy(self)
        other.rank = rank
        return other

    @property
    def lanes(self) -> int:
        """The number of lanes, L."""
        return self.order.lanes

    @property
    def samples_per_epoch(self) -> int:
        """Rows of one epoch of every set, over all ranks."""
        return sum(order.samples_per_epoch for order in self.order.orders)

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that an epoch drops, fewer than L of each set."""
        return sum(order.dropped_per_epoch for order in self.order.orders)

    @property
    def micro_steps(self) -> int:
        """Micro-batches of this rank in a step, A = G / (R·B)."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def iterate(
        self, start_sample: int = 0, *, end_sample: int | None = None, skipped: Iterable[Sequence[int]] = ()
    ) -> Iterator[Batch]:
        """Iterate over this rank's micro-batches of the rows [start_sample, end_sample), in order.

        Args:
            start_sample: the position of the job, in samples over all ranks; a multiple of G.
            end_sample: a multiple of R·B; None to iterate without end.
            skipped: stretches [start, end) of rows to leave out (`skipping`), multiples of G; the other two count what is left.

        Raises:
            DataError: a sample is damaged (the message names it) or data cannot be reached; only if `raises`.
            ValueError: `start_sample` is not a multiple of G, or `end_sample` not a multiple of R·B.
        """
        micro_step = self.micro_batch * self.world_size
        if start_sample < 0 or start_sample % self.global_batch:
            raise ValueError(f"expected start_sample to be a multiple of {self.global_batch} (G), got {start_sample}")
        order = without_rows(self.order, skipped, self.lanes)
        if end_sample is None:
            return self._micro_batches(order, start_sample // self.lanes, None)
        if end_sample < start_sample or end_sample % micro_step:
            raise ValueError(
                f"expected end_sample to be a multiple of {micro_step} (ranks × micro-batch) and at least {start_sample}, "
                f"got {end_sample}"
            )
        num_micro_batches = (end_sample - start_sample) // micro_step
        end_round = -(-end_sample // self.lanes)
        return itertools.islice(self._micro_batches(order, start_sample // self.lanes, end_round), num_micro_batches)

    def _micro_batches(self, order: RowOrder, start_round: int, end_round: int | None) -> Iterator[Batch]:
        rounds = self._rounds(order, start_round, end_round)
        return micro_batches(rounds, self.micro_batch, self.manifest.sequence_length, self.raises)

    def _rounds(self, order: RowOrder, start_round: int, end_round: int | None) -> Rounds:
        """Yield this rank's samples, a few rounds at a time, in the order of the rows."""
        dataset = LaneRounds(
            self.sets,
            self.manifests,
            self.source_maps,
            order,
            self.access,
            lanes=rank_lanes(self.lanes, self.micro_batch, self.rank, self.world_size),
            start_round=start_round,
            end_round=end_round,
        )
        if self.num_workers == 0:
            yield from rounds_here(dataset)
            return

        # Workers. The loader draws a seed for them, from a generator of its own, to leave the job's random state unchanged.
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_identity,
            generator=torch.Generator(),
            worker_init_fn=_ignore_stop_signals,
        )
        with _signals_blocked(_STOP_SIGNALS):
            started = iter(loader)
        chunks = map(_raise_if_error, started)
        del started

        # Merge one chunk of each worker at a time.
        try:
            while first := next(chunks, None):
                rest = [next(chunks) for _ in range(self.num_workers - 1)]
                yield merge_chunks([first, *rest])
        finally:
            # Stop the workers here. The garbage collector would close their queues before it tells them to stop, and an error
            # would then take five seconds a worker.
            del chunks


def rounds_here(dataset: LaneRounds) -> Rounds:
    """Read the rounds in this process, a few at a time, without a worker."""
    return (merge_chunks([chunk]) for chunk in map(_raise_if_error, dataset))


def micro_batches(rounds: Rounds, micro_batch: int, sequence_length: int, raises: bool) -> Iterator[Batch]:
    """Cut a rank's samples, some whole rounds at a time, into micro-batches.

    raises: raise an error for damage and unreachable data; otherwise the batches say it, and those of unreachable data have no
    end.
    """
    try:
        # Closed at once: workers end with their rounds, and an error's traceback would keep them.
        with closing(rounds):
            for samples in rounds:
                for start in range(0, len(samples), micro_batch):
                    batch = collate(samples[start : start + micro_batch])
                    if batch.damage and raises:
                        raise DataError(batch.damage[0])
                    yield batch
    except DataError as error:
        if raises:
            raise
        while True:
            yield blank_batch(micro_batch, sequence_length, str(error))


def _ignore_stop_signals(worker: int) -> None:
    """Make a loader worker ignore stop signals, except from its rank.

    A scheduler signals every process of a job, and Ctrl-C every process of a terminal. The rank then finishes its step and
    saves a checkpoint. A worker that died of the signal meanwhile would make the rank fail.
    """
    threading.Thread(target=_exit_on_signal_of_the_rank, daemon=True).start()


def _exit_on_signal_of_the_rank() -> None:
    while signal.sigwaitinfo(_STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def _signals_blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals: in this process until the end of the block, in processes that are started within it for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise_if_error(chunk: RoundsChunk | DataError) -> RoundsChunk:
    if isinstance(chunk, DataError):
        raise chunk
    return chunk


def _identity(chunk: object) -> object:
    return chunk
