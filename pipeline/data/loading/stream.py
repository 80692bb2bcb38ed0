"""The rows of one rank, as micro-batches, from any position of the run.

The position of the whole job is one integer, samples consumed, and what comes at a position is a pure function of it
(`order`, `mixture`). This module only says who reads what. A *round* is one sample of each of the L lanes; a step of G rows
is G / L rounds, and micro-step a of a step holds its rows [a·R·B, (a+1)·R·B), of which rank r has a·R·B + r·B + [0, B). L is
a multiple of R·B, so each lane is read by one rank for as long as the number of ranks stays.

A rank's lanes are split over its DataLoader workers, which own lanes and not batches: each yields its pieces of the rounds,
the DataLoader hands the pieces out in turn, and put together they are the rank's part of the rounds in the order of its
rows. So the number of workers changes nothing but speed. Pieces travel as numpy arrays through a pipe, and not as tensors
through /dev/shm, which containers keep small.

A sample that is damaged is replaced by a row of padding that says so, and data that cannot be reached by such rows for
ever: where the ranks have to go on together until they agree, the batches carry the bad news; elsewhere it is raised.
"""

import copy
import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch, blank_batch, collate
from pipeline.data.loading.lane_reader import LaneRounds, Piece, put_together, rank_lanes
from pipeline.data.loading.mixture import DataSet, join, order_of
from pipeline.data.loading.order import default_lanes
from pipeline.data.loading.sizes import check_sizes
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.sample import Sample
from pipeline.storage.files import DIRECT, Access
from pipeline.storage.location import Place, Url

__all__ = ["Stream", "check_sizes", "default_lanes", "rank_lanes"]

_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stream:
    """One rank's view of a prepared folder, or of several.

    Args:
        data: the prepared folder, or the sets of a mixture.
        lanes: L. global_batch: G, rows a step. micro_batch: B, rows a rank and micro-step.
        rank, world_size: of this process, R.
        seed, shuffle_block: of the order; both are part of what a run is.
        num_workers: DataLoader processes; 0 reads in this process.
        access: how data that is not on this machine is reached.
        raises: whether damage and data out of reach are raised by `iterate`. If not, `Batch.damage` and `Batch.failure` say
            so, and the rows concerned are padding.

    Raises:
        DataError: a folder is not a prepared one, or the sizes do not fit (all problems at once).
    """

    def __init__(
        self,
        data: Place | Sequence[DataSet],
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
        self.manifests = [read_manifest(each.place, access) for each in self.sets]
        self.manifest, self.source_maps = join(self.manifests, self.sets)
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
        """The view of another rank, without reading any manifest again."""
        assert 0 <= rank < self.world_size
        other = copy.copy(self)
        other.rank = rank
        return other

    @property
    def lanes(self) -> int:
        """L."""
        return self.order.lanes

    @property
    def samples_per_epoch(self) -> int:
        """Rows that an epoch of every set uses, over all ranks."""
        return sum(order.samples_per_epoch for order in self.order.orders)

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that an epoch leaves out, fewer than L of each set."""
        return sum(order.dropped_per_epoch for order in self.order.orders)

    @property
    def micro_steps(self) -> int:
        """A: micro-batches of this rank in a step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def iterate(self, start_sample: int = 0, *, end_sample: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of the rows [start_sample, end_sample), in order; without an end, for ever.

        Raises:
            DataError: a sample is damaged, the message names it; or data cannot be reached. Only if `raises`.
            ValueError: `start_sample` is not a multiple of G, or `end_sample` none of R·B.
        """
        micro_step = self.micro_batch * self.world_size
        if start_sample < 0 or start_sample % self.global_batch:
            raise ValueError(f"expected start_sample to be a multiple of {self.global_batch} (G), got {start_sample}")
        if end_sample is None:
            return self._micro_batches(start_sample // self.lanes, None)
        if end_sample < start_sample or end_sample % micro_step:
            raise ValueError(
                f"expected end_sample to be a multiple of {micro_step} (ranks × micro-batch) and at least {start_sample}, "
                f"got {end_sample}"
            )
        num_micro_batches = (end_sample - start_sample) // micro_step
        end_round = -(-end_sample // self.lanes)
        return itertools.islice(self._micro_batches(start_sample // self.lanes, end_round), num_micro_batches)

    def _micro_batches(self, start_round: int, end_round: int | None) -> Iterator[Batch]:
        try:
            for samples in self._rounds(start_round, end_round):
                for start in range(0, len(samples), self.micro_batch):
                    batch = collate(samples[start : start + self.micro_batch])
                    if batch.damage and self.raises:
                        raise DataError(batch.damage[0])
                    yield batch
        except DataError as error:
            if self.raises:
                raise
            while True:
                yield blank_batch(self.micro_batch, self.manifest.sequence_length, str(error))

    def _rounds(self, start_round: int, end_round: int | None) -> Iterator[list[Sample]]:
        """This rank's samples of a few rounds after the other, in the order of the rows."""
        dataset = LaneRounds(
            self.sets,
            self.manifests,
            self.source_maps,
            self.order,
            self.access,
            lanes=rank_lanes(self.lanes, self.micro_batch, self.rank, self.world_size),
            start_round=start_round,
            end_round=end_round,
        )
        if self.num_workers == 0:
            yield from (put_together([piece]) for piece in map(_raise_if_error, dataset))
            return
        # The loader draws a seed for its workers; from a generator of its own, lest it move the job's random state.
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            worker_init_fn=_end_only_with_the_rank,
        )
        with _deaf_to(_ASKED_TO_STOP):
            started = iter(loader)
        pieces = map(_raise_if_error, started)
        del started
        try:
            while first := next(pieces, None):
                rest = [next(pieces) for _ in range(self.num_workers - 1)]
                yield put_together([first, *rest])
        finally:
            # Stops the workers here. Left to the garbage collector, which closes their queues before it asks them to stop,
            # an error would cost five seconds a worker.
            del pieces


def _end_only_with_the_rank(worker: int) -> None:
    """Schedulers signal every process of a job, and Ctrl-C every process of a terminal. The rank finishes its step and
    saves; a loader worker that died of the signal meanwhile would take it along. So a worker heeds its rank alone."""
    threading.Thread(target=_wait_for_the_rank, daemon=True).start()


def _wait_for_the_rank() -> None:
    while signal.sigwaitinfo(_ASKED_TO_STOP).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def _deaf_to(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals wait until the end of the block, in this process; processes started in it stay deaf to them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise_if_error(piece: Piece | DataError) -> Piece:
    if isinstance(piece, DataError):
        raise piece
    return piece


def _as_it_is(piece: object) -> object:
    return piece
