"""What a frozen reference thinks of every token of a data set, computed once and read while training.

A cache directory holds a folder for each data set that was scored, named by the sha256 of its manifest:

    CACHE/3f2a91c07d5e8b64/manifest.json          what was scored, with which reference, and how
                           NAME.losses            of each shard: little-endian floats [samples, T, C]
                           NAME.losses.crc32      uint32 of every sample: the CRC-32 of its bytes behind that of whose they are

"Whose" is what was scored, how, and the shard's sha256 (`LossesManifest.checksum`), so that files of another shard, data set
or reference pass for nothing but damage.

C is 1 where the reference gives each token's loss given all before it (`shifted`), or H, one column a head of its own, at the
position from which the head looks ahead (`matched`). float32 keeps every bit, so that the selection is that of the live
reference; float16 is half the size and rounds a loss by at most one part in 2,048 (0.005 nats at 10).

A folder appears by a rename, complete. While it is made it is `….partial` and holds each finished *piece*, a run of a
shard's samples, as a file of its own: what is there is not computed again.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.errors import DataError
from pipeline.data.lru_cache import LeastRecentlyUsed
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest
from pipeline.data.shards.reader import MAX_OPEN_SHARDS, ShardReader
from pipeline.data.shards.sample import Sample
from pipeline.data.shards.table import Shard
from pipeline.data.shards.writer import CRC
from pipeline.storage.faults import raise_if_of_the_machine
from pipeline.storage.files import StorageError
from pipeline.storage.whole_file import publish, whole_file, write_file

_SAMPLES_SCORED_AT_ONCE = 1024
Piece = tuple[int, int, int]
"""(shard, first sample, end) of a run of a shard's samples."""
_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


class LossesManifest(BaseModel):
    """data_sha256: of the data's manifest. reference_sha256: the model's fingerprint; reference: where it was. precision: in
    which it ran. dtype: of the stored losses. columns: C."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[2] = 2
    data_sha256: str
    reference_sha256: str
    reference: str
    precision: str
    horizon: Literal["shifted", "matched"]
    dtype: Literal["float32", "float16"]
    sequence_length: int
    columns: int

    @property
    def sample_bytes(self) -> int:
        return self.sequence_length * self.columns * _DTYPES[self.dtype].itemsize

    def checksum(self, shard: Shard, data: bytes | memoryview) -> int:
        """Of a sample's bytes, as losses of this shard made in this way. Where the reference lay does not count."""
        whose = [*self.model_dump(exclude={"reference"}).values(), shard.sha256]
        return zlib.crc32(data, zlib.crc32("\n".join(map(str, whose)).encode()))


def data_fingerprint(manifest_json: bytes) -> str:
    """Of a data set: its manifest names every shard's sha256."""
    return hashlib.sha256(manifest_json).hexdigest()


def losses_folder(cache: Path, data_sha256: str) -> Path:
    return cache / data_sha256[:16]


def read_losses_manifest(cache: Path, data_sha256: str, data: str) -> LossesManifest:
    """What `cache` holds for the data set with this fingerprint; `data` names it in messages.

    Raises:
        DataError: nothing, or nothing that can be read.
    """
    folder = losses_folder(cache, data_sha256)
    remedy = "score it with launch/score.py"
    if not (folder / MANIFEST_FILE).is_file():
        found = sorted(path.name for path in cache.glob(f"*/{MANIFEST_FILE}")) if cache.is_dir() else []
        kind = f"it has losses of {len(found)} other data set(s)" if found else "it has no reference losses at all"
        raise DataError(f"{cache}: no reference losses of {data} as it is now, {kind}; {remedy}")
    try:
        manifest = LossesManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder / MANIFEST_FILE} cannot be read ({error}); remove {folder} and {remedy} again") from None
    if manifest.data_sha256 != data_sha256:
        raise DataError(f"{folder}: made for another data set than {data}; remove it and {remedy}")
    return manifest


@dataclass(frozen=True)
class CachedLosses:
    """A cache directory and what it holds for a data set."""

    cache: Path
    manifest: LossesManifest


def find_losses(
    cache: Path,
    data_sha256: str,
    data: str,
    *,
    horizon: str,
    columns: int,
    precision: str,
    reference_sha256: str | None,
) -> CachedLosses:
    """What `cache` holds for a data set, if it is what the run needs; `reference_sha256` None: whichever reference it was.

    Raises:
        DataError: it holds none for this data as it is now, or losses of another reference or made in another way.
    """
    manifest = read_losses_manifest(cache, data_sha256, data)
    needed = {"horizon": horizon, "columns": columns, "precision": precision, "reference_sha256": reference_sha256}
    for name, value in needed.items():
        found = getattr(manifest, name)
        if value is not None and found != value:
            raise DataError(
                f"{losses_folder(cache, data_sha256)}: the losses of {data} were made with {name} {found} (reference "
                f"{manifest.reference}), this run needs {value}; score the data again into another directory"
            )
    return CachedLosses(cache, manifest)


class ReferenceLosses:
    """Reads a data set's losses by shard and sample index."""

    def __init__(self, cached: CachedLosses, data: Manifest, max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self._folder, self._losses, self._data = losses_folder(cached.cache, cached.manifest.data_sha256), cached.manifest, data
        self._open: LeastRecentlyUsed[int, tuple[int, int]] = LeastRecentlyUsed(max_open_shards, _close)

    def read(self, shard_index: int, sample_index: int) -> np.ndarray:
        """float32 [T, C].

        Raises:
            DataError: the losses are damaged or not there; the message names shard and sample.
            StorageError: they cannot be reached.
        """
        shard, size = self._data.shards[shard_index], self._losses.sample_bytes
        name = shard.name
        try:
            losses, crc32 = self._open.get(shard_index, lambda: self._open_shard(name))
            data, expected = os.pread(losses, size, size * sample_index), os.pread(crc32, 4, 4 * sample_index)
        except OSError as error:
            raise_if_of_the_machine(error, self._folder, MANIFEST_FILE)
            raise DataError(f"{self._folder / name}.losses: {error.strerror}; score the data again") from None
        if len(data) != size or len(expected) != 4 or self._losses.checksum(shard, data) != int.from_bytes(expected, "little"):
            raise DataError(
                f"the reference losses of shard {name}, sample {sample_index}, in {self._folder} are damaged, or not of this "
                "shard; copy the folder again, or remove it and score the data again"
            )
        stored = np.frombuffer(data, _DTYPES[self._losses.dtype])
        return stored.astype(np.float32).reshape(self._losses.sequence_length, self._losses.columns)

    def blank(self) -> np.ndarray:
        """In the place of losses that cannot be read, for a row without valid pairs."""
        return np.zeros((self._losses.sequence_length, self._losses.columns), np.float32)

    def close(self) -> None:
        self._open.clear()

    def _open_shard(self, name: str) -> tuple[int, int]:
        path = self._folder / f"{name}.losses"
        losses = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return losses, os.open(f"{path}.crc32", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(losses)
            raise


def _close(files: tuple[int, int]) -> None:
    for file in files:
        os.close(file)


class ReaderWithLosses:
    """A `ShardReader` whose samples carry their reference losses. Losses that are damaged damage their sample."""

    def __init__(self, reader: ShardReader, cached: CachedLosses, max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self._reader, self._losses = reader, ReferenceLosses(cached, reader.manifest, max_open_shards)

    def read_many(self, shards: Sequence[int], samples: Sequence[int]) -> list[Sample]:
        """As `ShardReader.read_many`."""
        places = zip(self._reader.read_many(shards, samples), shards, samples, strict=True)
        try:
            return [self._with_losses(sample, shard, index) for sample, shard, index in places]
        except StorageError as error:
            raise DataError(str(error)) from None

    def close(self) -> None:
        self._reader.close()
        self._losses.close()

    def _with_losses(self, sample: Sample, shard: int, index: int) -> Sample:
        try:
            return replace(sample, reference_losses=self._losses.read(shard, index))
        except DataError as error:
            none = sample.lengths[:0]
            sources = None if sample.sources is None else sample.sources[:0]
            losses = self._losses.blank()
            return replace(sample, lengths=none, sources=sources, damage=sample.damage or str(error), reference_losses=losses)


class LossesWriter:
    """Makes a data set's folder of losses, piece by piece, by any number of processes that share the file system."""

    def __init__(self, cache: Path, losses: LossesManifest, data: Manifest) -> None:
        self.folder = losses_folder(cache, losses.data_sha256)
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")
        self._losses, self._data = losses, data

    def begin(self) -> list[Piece] | None:
        """The pieces that are still to be made, None if the folder is complete; one process calls, before all write.

        Raises:
            DataError: what is there, finished or begun, was made with another reference or in another way.
        """
        for folder in (self.folder, self.partial):
            if (folder / MANIFEST_FILE).is_file():
                found = json.loads((folder / MANIFEST_FILE).read_text())
                differing = [key for key, value in self._losses.model_dump().items() if found.get(key) != value]
                if [key for key in differing if key != "reference"]:
                    raise DataError(
                        f"{folder} was made with other settings ({', '.join(differing)}); remove it, or name another"
                    )
        if (self.folder / MANIFEST_FILE).is_file():
            return None
        self.partial.mkdir(parents=True, exist_ok=True)
        write_file(self.partial / MANIFEST_FILE, (self._losses.model_dump_json(indent=1) + "\n").encode())
        return [piece for piece in self._pieces() if not self._file_of(piece).is_file()]

    def write(self, piece: Piece, losses_NTC: np.ndarray) -> None:
        """The losses, float32 [samples, T, C], of a whole piece."""
        write_file(self._file_of(piece), losses_NTC.astype(_DTYPES[self._losses.dtype]).tobytes())

    def join(self, shard: int) -> None:
        """Put a shard's pieces together; all of them are there."""
        of, size = self._data.shards[shard], self._losses.sample_bytes
        checksums = []
        with whole_file(self.partial / f"{of.name}.losses") as file:
            for piece in self._pieces_of(shard):
                data = memoryview(self._file_of(piece).read_bytes())
                checksums += [self._losses.checksum(of, data[start : start + size]) for start in range(0, len(data), size)]
                file.write(data)
        write_file(self.partial / f"{of.name}.losses.crc32", np.array(checksums, CRC).tobytes())

    def finish(self) -> None:
        """Remove the pieces and give the folder its name; one process calls, when all shards are joined."""
        # The second: what a kill left half written.
        for leftover in {*self.partial.glob("*.piece*"), *self.partial.glob("*.tmp")}:
            leftover.unlink()
        publish(self.partial, self.folder)

    def _pieces(self) -> Iterator[Piece]:
        for shard in range(len(self._data.shards)):
            yield from self._pieces_of(shard)

    def _pieces_of(self, shard: int) -> Iterator[Piece]:
        samples = self._data.shards[shard].samples
        for first in range(0, samples, _SAMPLES_SCORED_AT_ONCE):
            yield shard, first, min(first + _SAMPLES_SCORED_AT_ONCE, samples)

    def _file_of(self, piece: Piece) -> Path:
        shard, first, _ = piece
        return self.partial / f"{self._data.shards[shard].name}.{first:08d}.piece"
