"""The index of a shard: offsets (`.idx`) and checksums (`.crc32`) of its samples, read in chunks of 1,024 samples.

The `.crc32` file itself is checked too, or else a shard that was replaced by another one, together with both its index files,
would pass. The manifest has a CRC-32 for each chunk of 1,024 samples of that file. A chunk is checked when it is first read,
so that a reader of few samples reads little more than these.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.lru_cache import LRUCache
from pipeline.data.shards.open_shards import OpenShards
from pipeline.data.shards.sample import DamageError
from pipeline.data.shards.table import INDEX_CHUNK_SAMPLES, ShardTable
from pipeline.data.shards.writer import CRC, OFFSET
from pipeline.storage.files import OpenFile


@dataclass(frozen=True)
class ReadRange:
    """Neighbouring samples of a shard, to be read from its tar by one read.

    shard: index of the shard.
    positions: of the samples in the caller's list.
    samples: their indices in the shard.
    offsets: in the tar, in bytes; one entry more than samples, the last is the end.
    checksums: their CRC-32s.
    """

    shard: int
    positions: list[int]
    samples: list[int]
    offsets: list[int]
    checksums: list[int]


# Offsets are read one by one (16 bytes each) for up to so many samples of a chunk, then for the whole chunk (8 KB). So a reader
# of few samples reads little, as when many readers share a block, and a reader of many reads them about once.
_MAX_SINGLE_READS = 160
_UNKNOWN = np.uint64(2**64 - 1)
_MAX_CHUNKS = 1024

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


class IndexChunk:
    """The index of up to 1,024 neighbouring samples of a shard.

    checksums: uint32 [n], all of them, or fewer if the file is cut.
    offsets: uint64 [n + 1], read on demand; `_UNKNOWN` where they were not read yet, or the file is cut.
    """

    def __init__(self, number: int, num_samples: int, checksums: bytes) -> None:
        self.first = number * INDEX_CHUNK_SAMPLES
        self.offsets = np.full(min(INDEX_CHUNK_SAMPLES, num_samples - self.first) + 1, _UNKNOWN)
        self.checksums = _whole_items(checksums, CRC)
        self._num_requested = 0
        self._is_complete = False

    def unread(self, samples: Sequence[int]) -> list[int]:
        """List those of the given samples whose offsets were not read yet."""
        if self._is_complete:
            return []
        within = np.array(samples) - self.first
        is_unread = (self.offsets[within] == _UNKNOWN) | (self.offsets[within + 1] == _UNKNOWN)
        return np.array(samples)[is_unread].tolist()

    def read_offsets(self, idx: OpenFile, samples: Sequence[int], *, one_by_one: bool) -> None:
        """Read the offsets of the given samples: if `one_by_one` and they are few only theirs, else the whole chunk."""
        unread = self.unread(samples)
        self._num_requested += len(unread)
        if one_by_one and self._num_requested <= _MAX_SINGLE_READS:
            for sample in unread:
                self._read(idx, sample, 2)
        elif unread:
            self._read(idx, self.first, len(self.offsets))
            self._is_complete = True

    def _read(self, idx: OpenFile, first: int, count: int) -> None:
        offsets = _whole_items(idx.read(OFFSET.itemsize * first, OFFSET.itemsize * count), OFFSET)
        self.offsets[first - self.first : first - self.first + len(offsets)] = offsets

    def extent(self, sample: int) -> tuple[int, int, int] | None:
        """Return (start, end, checksum) of a sample whose offsets were read; None if one of the files is cut before it."""
        within = sample - self.first
        start, end = self.offsets[within : within + 2].tolist()
        if within >= len(self.checksums) or _UNKNOWN in (start, end):
            return None
        return start, end, int(self.checksums[within])


class IndexChunks:
    """The index chunks of a folder's shards, read as they are wanted; those that were used last are kept."""

    def __init__(self, table: ShardTable, shards: OpenShards) -> None:
        self._table = table
        self._shards = shards
        self._kept: LRUCache[tuple[int, int], IndexChunk] = LRUCache(_MAX_CHUNKS)

    def of(self, samples_by_shard: dict[int, list[int]], map_: Map) -> dict[tuple[int, int], IndexChunk | Exception]:
        """Get the index chunks of the wanted samples, by (shard, number of the chunk), from the cache or from their files.

        map_: calls a function with each of several items, perhaps in parallel.
        """
        # The wanted samples of each chunk.
        by_chunk: dict[tuple[int, int], list[int]] = {}
        for shard, samples in samples_by_shard.items():
            for sample in samples:
                by_chunk.setdefault((shard, sample // INDEX_CHUNK_SAMPLES), []).append(sample)

        # Chunks in the cache that have all wanted offsets.
        known = {name: self._kept.find(name) for name in sorted(by_chunk)}
        chunks: dict[tuple[int, int], IndexChunk | Exception]
        chunks = {name: chunk for name, chunk in known.items() if chunk is not None and not chunk.unread(by_chunk[name])}

        # All others are read.
        unread = [name for name in known if name not in chunks]
        read = map_(lambda name: self._read(name, known[name], by_chunk[name]), unread)
        for name, chunk in zip(unread, read, strict=True):
            if not isinstance(chunk, Exception):
                self._kept.put(name, chunk)
            chunks[name] = chunk
        return chunks

    def invalidate(self, shard: int, chunk: int) -> bool:
        """Forget a chunk, and drop its copies in the disk cache; returns true if there were some."""
        self._kept.drop((shard, chunk))
        if not self._shards.is_remote:  # local files and pipes have no cached copies, and opening a pipe would run its command
            return False
        _, idx, crc32 = self._shards.files(shard)
        offsets, checksums = self._extents(shard, chunk)
        had_offsets = idx.invalidate(*offsets)
        return crc32.invalidate(*checksums) or had_offsets

    def _read(
        self, name: tuple[int, int], chunk: IndexChunk | None, samples: Sequence[int]
    ) -> IndexChunk | DamageError | OSError:
        try:
            _, idx, crc32 = self._shards.files(name[0])

            # The checksums of a new chunk, held against the manifest.
            if chunk is None:
                checksums = crc32.read(*self._extents(*name)[1])
                expected, found = self._table.chunk_crc32(*name), zlib.crc32(checksums)
                if expected is not None and found != expected:
                    return DamageError(
                        f"the CRC-32 of its piece of its shard's .crc32 is {found:08x}, the manifest has {expected:08x}: the "
                        "file is damaged, or the shard was exchanged for another"
                    )
                chunk = IndexChunk(name[1], int(self._table.samples[name[0]]), checksums)

            chunk.read_offsets(idx, samples, one_by_one=not self._shards.is_remote)
        except OSError as error:
            self._shards.raise_if_machine_fault(error)
            return error
        return chunk

    def _extents(self, shard: int, chunk: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Locate a chunk in its shard's `.idx` and `.crc32`: (start, size) in bytes of each."""
        first = chunk * INDEX_CHUNK_SAMPLES
        count = min(INDEX_CHUNK_SAMPLES, int(self._table.samples[shard]) - first)
        return (OFFSET.itemsize * first, OFFSET.itemsize * (count + 1)), (CRC.itemsize * first, CRC.itemsize * count)


def _whole_items(data: bytes, dtype: np.dtype) -> np.ndarray:
    # A file that was cut may end within an item.
    return np.frombuffer(data[: len(data) - len(data) % dtype.itemsize], dtype)
