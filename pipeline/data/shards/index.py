"""The index of a shard: offsets (`.idx`) and checksums (`.crc32`) of its samples, read in chunks of 1,024 samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.shards.table import INDEX_CHUNK_SAMPLES, Shard
from pipeline.data.shards.writer import CRC, OFFSET
from pipeline.storage.files import Access, OpenFile, open_file
from pipeline.storage.location import Location


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


class OpenShard:
    """The three open files of a shard: tar, offsets and checksums, in this order."""

    def __init__(self, location: Location, shard: Shard, access: Access) -> None:
        self.files: list[OpenFile] = []
        indices = {"tar.idx": OFFSET.itemsize * (shard.samples + 1), "tar.crc32": CRC.itemsize * shard.samples}
        try:
            for suffix, size in ({"tar": shard.bytes} | indices).items():
                self.files.append(open_file(location / f"{shard.name}.{suffix}", size, access))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close all files."""
        while self.files:
            self.files.pop().close()


def _whole_items(data: bytes, dtype: np.dtype) -> np.ndarray:
    # A file that was cut may end within an item.
    return np.frombuffer(data[: len(data) - len(data) % dtype.itemsize], dtype)
