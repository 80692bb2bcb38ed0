"""Random access to the samples of a prepared folder, with every sample checked.

Tar readers silently ignore a cut between members and a flipped bit. Here the bytes of a sample are exactly those between two
offsets of the shard's `.idx`, and must have the CRC-32 that was written when the shard was made. Only then are they decoded
and checked against the manifest.

The index files themselves are held against the manifest (`index`).

Samples are requested many at a time: neighbours in a shard are read by one read, remote shards by parallel requests. Only so
many index chunks and open shards are kept, so memory and open files do not grow with the size or number of shards.
"""

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.shards.index import IndexChunk, IndexChunks, ReadRange
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.open_shards import OpenShards
from pipeline.data.shards.sample import DamageError, Sample, SampleDecoder
from pipeline.data.shards.table import INDEX_CHUNK_SAMPLES, ShardTable
from pipeline.storage.files import DIRECT, Access, StorageError
from pipeline.storage.location import Location

MAX_OPEN_SHARDS = 64
_MAX_RANGE_BYTES = 8 * 2**20
_REQUESTS_AT_ONCE = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


class DamagedSampleError(DataError):
    """A sample is damaged, missing or does not fit the manifest; the message names shard and sample."""


class ShardReader:
    """Reader of a prepared folder's samples by shard and sample index; keeps `max_open_shards` shards open, 3 files each."""

    def __init__(
        self, directory: Location, manifest: Manifest, access: Access = DIRECT, max_open_shards: int = MAX_OPEN_SHARDS
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self._table = ShardTable.of(manifest.shards)
        self._samples_before = np.cumsum(self._table.samples) - self._table.samples
        self._closed = threading.Event()
        self._decoder = SampleDecoder(manifest)
        self._shards = OpenShards(directory, manifest, replace(access, cancelled=self._closed), max_open_shards)
        self._index = IndexChunks(self._table, self._shards)
        self._pool: ThreadPoolExecutor | None = None

    def read(self, shard_index: int, sample_index: int) -> Sample:
        """Read and check one sample.

        Raises:
            DamagedSampleError: the sample is damaged or does not fit the manifest.
            DataError: the data cannot be reached.
            IndexError: the manifest has no such sample.
        """
        shard = self.manifest.shards[shard_index]
        if not 0 <= sample_index < shard.samples:
            raise IndexError(f"shard {shard.name} has samples 0 to {shard.samples - 1}, not {sample_index}")
        (sample,) = self.read_many([shard_index], [sample_index])
        if sample.damage is not None:
            raise DamagedSampleError(sample.damage)
        return sample

    def read_many(self, shards: Sequence[int], samples: Sequence[int]) -> list[Sample]:
        """Read and check many samples, sample i at index `samples[i]` of shard `shards[i]`.

        A damaged sample is replaced by a row of padding whose `damage` is the error message.

        Raises:
            DataError: the data cannot be reached.
        """
        found: list[Sample | None] = [None] * len(shards)
        try:
            for positions_by_shard in self._grouped_by_shard(shards):
                self._read_positions(positions_by_shard, samples, found)
                # A sample may seem damaged because the disk cache has a damaged copy of the index: drop it and read again.
                retried = self._invalidate_damaged(positions_by_shard, samples, found)
                if retried:
                    self._read_positions(retried, samples, found)
        except StorageError as error:
            raise DataError(str(error)) from None
        return found  # type: ignore[return-value]

    def padding(self) -> Sample:
        """Make a row of padding that replaces nothing."""
        return self._decoder.blank("(padding)", None)

    def close(self) -> None:
        """Close all files and stop all threads and retries. The reader cannot be used afterwards."""
        self._closed.set()
        self._shards.close()
        if self._pool is not None:
            # Do not wait: the garbage collector may close a reader in the very thread for which its requests wait.
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _read_positions(
        self, positions_by_shard: dict[int, list[int]], samples: Sequence[int], found: list[Sample | None]
    ) -> None:
        """Read the samples at the given positions of the caller's list into `found`."""
        samples_by_shard = {
            shard: [samples[position] for position in positions] for shard, positions in positions_by_shard.items()
        }
        ranges = list(self._ranges(positions_by_shard, samples_by_shard, self._index.of(samples_by_shard, self._map), found))
        for range_, read in zip(ranges, self._map(self._read_range, ranges), strict=True):
            for position, sample in zip(range_.positions, read, strict=True):
                found[position] = sample

    def _invalidate_damaged(
        self, positions_by_shard: dict[int, list[int]], samples: Sequence[int], found: Sequence[Sample | None]
    ) -> dict[int, list[int]]:
        """Invalidate cached copies of the index of damaged samples; returns the positions worth reading again, by shard."""
        retried: dict[int, list[int]] = {}
        for shard, positions in positions_by_shard.items():
            damaged = [at for at in positions if (sample := found[at]) is not None and sample.damage is not None]
            chunks = {samples[at] // INDEX_CHUNK_SAMPLES for at in damaged}
            invalidated = {chunk for chunk in chunks if self._index.invalidate(shard, chunk)}
            if again := [at for at in damaged if samples[at] // INDEX_CHUNK_SAMPLES in invalidated]:
                retried[shard] = again
        return retried

    def _grouped_by_shard(self, shards: Sequence[int]) -> Iterator[dict[int, list[int]]]:
        """Group positions in the caller's list by shard. Yields remote shards in one group, to read them in parallel, and
        local shards one by one: a shard must not be evicted from the open files while it is being read."""
        positions: dict[int, list[int]] = {}
        for position, shard in enumerate(shards):
            positions.setdefault(int(shard), []).append(position)
        if self._shards.is_remote:
            yield positions
        else:
            yield from ({shard: of_shard} for shard, of_shard in positions.items())

    def _map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterable[Result]:
        if not self._shards.is_remote or len(items) < 2:
            return map(function, items)
        if self._closed.is_set():  # by another thread; nobody would shut down a new pool
            raise StorageError(f"{self.directory}: not read; its reader was closed meanwhile")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
        return self._pool.map(function, items)

    def _ranges(
        self,
        positions_by_shard: dict[int, list[int]],
        samples_by_shard: dict[int, list[int]],
        chunks: dict[tuple[int, int], IndexChunk | Exception],
        found: list[Sample | None],
    ) -> Iterator[ReadRange]:
        """Merge neighbouring wanted samples into ranges. Samples that the index cannot locate go to `found` as damaged."""
        for shard, samples in samples_by_shard.items():
            range_: ReadRange | None = None

            for sample, position in sorted(zip(samples, positions_by_shard[shard], strict=True)):
                try:
                    start, end, checksum = self._extent(shard, sample, chunks[shard, sample // INDEX_CHUNK_SAMPLES])
                except (DamageError, OSError) as damage:
                    found[position] = self._blank(shard, sample, damage)
                    continue

                # Extend the range if the sample follows it directly, else begin another.
                if range_ is not None and range_.offsets[-1] == start and end - range_.offsets[0] <= _MAX_RANGE_BYTES:
                    range_.positions.append(position)
                    range_.samples.append(sample)
                    range_.offsets.append(end)
                    range_.checksums.append(checksum)
                    continue
                if range_ is not None:
                    yield range_
                range_ = ReadRange(shard, [position], [sample], [start, end], [checksum])
            if range_ is not None:
                yield range_

    def _extent(self, shard: int, sample: int, chunk: IndexChunk | Exception) -> tuple[int, int, int]:
        if isinstance(chunk, Exception):
            raise chunk
        extent, num_bytes = chunk.extent(sample), self._table.sizes[shard]
        if extent is None:
            raise DamageError("its .idx or .crc32 ends before it")
        start, end, _ = extent
        if not start < end <= num_bytes:
            raise DamageError(f"its .idx puts it at bytes {start} to {end} of {num_bytes}")
        if end - start > self._decoder.max_bytes:
            raise DamageError(f"its .idx gives it {end - start} bytes, a row has at most {self._decoder.max_bytes}")
        return extent

    def _read_range(self, range_: ReadRange) -> list[Sample]:
        start, size = range_.offsets[0], range_.offsets[-1] - range_.offsets[0]
        try:
            tar = self._shards.files(range_.shard)[0]
            read = self._decode_all(tar.read(start, size), range_)
            # The damage may be in a copy in the disk cache: drop it and read again.
            if any(sample.damage is not None for sample in read) and tar.invalidate(start, size):
                read = self._decode_all(tar.read(start, size), range_)
            return read
        except OSError as error:
            self._shards.raise_if_machine_fault(error)
            return [self._blank(range_.shard, sample, error) for sample in range_.samples]

    def _decode_all(self, data: bytes, range_: ReadRange) -> list[Sample]:
        return [self._decode(data, range_, index) for index in range(len(range_.samples))]

    def _decode(self, data: bytes, range_: ReadRange, index: int) -> Sample:
        start, end = (offset - range_.offsets[0] for offset in range_.offsets[index : index + 2])
        own = data[start:end]
        try:
            if len(own) != end - start:
                raise DamageError(f"expected {end - start} bytes at {range_.offsets[index]} of the tar, got {len(own)}")
            if zlib.crc32(own) != range_.checksums[index]:
                raise DamageError(f"its CRC-32 is {zlib.crc32(own):08x}, expected {range_.checksums[index]:08x}")
            number = self._number(range_.shard, range_.samples[index])
            return self._decoder.decode(own, self._table.name(range_.shard), number)
        except DamageError as damage:
            return self._blank(range_.shard, range_.samples[index], damage)

    def _blank(self, shard: int, sample: int, damage: Exception) -> Sample:
        name = self._table.name(shard)
        message = (
            f"shard {name}, sample {sample}, in {self.directory} is damaged: {damage}; "
            "copy the shard and its .idx and .crc32 again from where the data was prepared, or prepare again"
        )
        return self._decoder.blank(f"{name}/(damaged: sample {sample})", message, self._number(shard, sample))

    def _number(self, shard: int, sample: int) -> int:
        return int(self._samples_before[shard]) + sample
