"""The three files of a shard, and what is read of its tar and of its index at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.shards.table import PIECE_SAMPLES, Shard
from pipeline.data.shards.writer import CRC, OFFSET
from pipeline.storage.files import Access, OpenFile, open_file
from pipeline.storage.location import Place


@dataclass(frozen=True)
class Run:
    """Samples side by side in a shard: their places in the caller's list, numbers, offsets (one more) and checksums."""

    shard: int
    places: list[int]
    samples: list[int]
    offsets: list[int]
    checksums: list[int]


# Of a piece the offsets of so many samples are read one by one, 16 bytes each, before all are read, 8 KB. A reader of a few of
# its samples reads little for them, as every reader of a block with many readers does; one of many not much more than once.
_FEW = 160
_UNKNOWN = np.uint64(2**64 - 1)


class IndexPiece:
    """Of a thousand samples side by side the checksums, uint32 [n], and those offsets that were asked for, uint64 [n + 1];
    `_UNKNOWN` where they were not, or the file ends before."""

    def __init__(self, number: int, num_samples: int, checksums: bytes) -> None:
        self.first = number * PIECE_SAMPLES
        self.offsets = np.full(min(PIECE_SAMPLES, num_samples - self.first) + 1, _UNKNOWN)
        self.checksums = _whole_items(checksums, CRC)
        self._num_asked = 0
        self._is_whole = False

    def lacking(self, samples: Sequence[int]) -> list[int]:
        """Those of these samples whose offsets were not asked for."""
        if self._is_whole:
            return []
        within = np.array(samples) - self.first
        is_lacking = (self.offsets[within] == _UNKNOWN) | (self.offsets[within + 1] == _UNKNOWN)
        return np.array(samples)[is_lacking].tolist()

    def read_offsets(self, idx: OpenFile, samples: Sequence[int], *, one_by_one: bool) -> None:
        """Read the offsets of these samples: of them alone, or of all, if that is to be rather than many requests."""
        lacking = self.lacking(samples)
        self._num_asked += len(lacking)
        if one_by_one and self._num_asked <= _FEW:
            for sample in lacking:
                self._read(idx, sample, 2)
        elif lacking:
            self._read(idx, self.first, len(self.offsets))
            self._is_whole = True

    def _read(self, idx: OpenFile, first: int, count: int) -> None:
        offsets = _whole_items(idx.read(OFFSET.itemsize * first, OFFSET.itemsize * count), OFFSET)
        self.offsets[first - self.first : first - self.first + len(offsets)] = offsets

    def extent(self, sample: int) -> tuple[int, int, int] | None:
        """Offset, end and checksum; None where one of the files ends before them."""
        within = sample - self.first
        start, end = self.offsets[within : within + 2].tolist()
        if within >= len(self.checksums) or _UNKNOWN in (start, end):
            return None
        return start, end, int(self.checksums[within])


class OpenShard:
    """The three files of a shard."""

    def __init__(self, place: Place, shard: Shard, access: Access) -> None:
        self.files: list[OpenFile] = []
        indices = {"tar.idx": OFFSET.itemsize * (shard.samples + 1), "tar.crc32": CRC.itemsize * shard.samples}
        try:
            for suffix, size in ({"tar": shard.bytes} | indices).items():
                self.files.append(open_file(place / f"{shard.name}.{suffix}", size, access))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        while self.files:
            self.files.pop().close()


def _whole_items(data: bytes, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(data[: len(data) - len(data) % dtype.itemsize], dtype)
