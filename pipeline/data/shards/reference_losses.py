"""Cached reference losses: the losses of a frozen reference on every token of a data set, computed once and read in training.
External scores, a number a token of the user's own making, are kept and read in the same way.

A cache directory holds a folder for each data set that was scored, named by the sha256 of its manifest:

    CACHE/3f2a91c07d5e8b64/manifest.json          what was scored, with which reference, and how
                           NAME.losses            of each shard: little-endian floats [samples, T, C]
                           NAME.losses.crc32      of each shard: uint32 [samples], a checksum of each sample's losses

A checksum is seeded with the identity of the losses: the data set, the reference, the settings of scoring, and the sha256 of
the shard (`LossesManifest.checksum`). Files of another shard, data set or reference therefore fail the check as damage would.

C is 1 if the reference gives each token's loss given all tokens before it (`shifted`), and for external scores; or H, one
column for each head of the reference, stored at the position from which the head predicts (`matched`). float32 keeps every bit,
so the selection equals that of the live reference. float16 takes half the space and rounds a loss by at most one part in 2,048
(0.005 nats at 10).

`losses_writer` writes these files, `launch/score.py` computes the losses, or imports scores (`external_scores`).
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.errors import DataError
from pipeline.data.lru_cache import LRUCache
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest
from pipeline.data.shards.reader import MAX_OPEN_SHARDS, ShardReader
from pipeline.data.shards.sample import Sample
from pipeline.data.shards.table import Shard
from pipeline.storage.faults import raise_if_machine_fault
from pipeline.storage.files import StorageError

STORED_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_PARTIAL = ".partial"


class LossesManifest(BaseModel):
    """The manifest of cached losses: what was scored, with which reference, and how.

    data_sha256: of the data's manifest.
    reference_sha256: fingerprint of the reference: of every byte of its weights and its config.json; of external scores their
        own, without those of padding.
    reference: its location when the data was scored, or the file of the external scores; not part of the identity of the
        losses.
    precision: in which the reference ran.
    horizon: meaning of the columns, see above, or `external`.
    dtype: of the stored losses.
    sequence_length: T.
    columns: C.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[3] = 3
    data_sha256: str
    reference_sha256: str
    reference: str
    precision: str
    horizon: Literal["shifted", "matched", "external"]
    dtype: Literal["float32", "float16"]
    sequence_length: int
    columns: int

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's losses, T · C · bytes of the dtype."""
        return self.sequence_length * self.columns * STORED_DTYPES[self.dtype].itemsize

    def checksum(self, shard: Shard, data: bytes | memoryview) -> int:
        """Compute a sample's checksum: the CRC-32 of its bytes, seeded with that of this manifest and of the shard's sha256.

        The location of the reference is left out, so that it may move.
        """
        identity = [*self.model_dump(exclude={"reference"}).values(), shard.sha256]
        return zlib.crc32(data, zlib.crc32("\n".join(map(str, identity)).encode()))


def data_fingerprint(manifest_json: bytes) -> str:
    """Fingerprint a data set: the sha256 of its manifest, which has the sha256 of every shard."""
    return hashlib.sha256(manifest_json).hexdigest()


def losses_folder(cache: Path, data_sha256: str) -> Path:
    """Name the folder of a data set's losses in a cache directory."""
    return cache / data_sha256[:16]


def partial_losses_folder(folder: Path) -> Path:
    """Name the folder that has a data set's losses while they are computed."""
    return folder.with_name(f"{folder.name}{_PARTIAL}")


def read_losses_manifest(cache: Path, data_sha256: str, data: str, *, horizon: str = "shifted") -> LossesManifest:
    """Read the manifest of the losses that a cache directory has for a data set.

    Args:
        cache: the cache directory.
        data_sha256: fingerprint of the data set.
        data: its name in error messages.
        horizon: that of the losses that are wanted, for the words of error messages.

    Raises:
        DataError: the cache has no losses of this data set, or their manifest cannot be read.
    """
    folder = losses_folder(cache, data_sha256)
    external = horizon == "external"
    remedy = (
        f"import them with launch/score.py --import FILE --data {data} --output {cache}"
        if external
        else "score it with launch/score.py"
    )
    if not (folder / MANIFEST_FILE).is_file():
        wanted = "external scores" if external else "reference losses"
        instead = _instead(cache, folder, wanted)
        raise DataError(f"{cache}: no {wanted} of {data} as it is now, {instead}; {remedy}")
    try:
        manifest = LossesManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder / MANIFEST_FILE} cannot be read ({error}); remove {folder} and {remedy} again") from None
    if manifest.data_sha256 != data_sha256:
        raise DataError(f"{folder}: made for another data set than {data}; remove it and {remedy}")
    return manifest


def _instead(cache: Path, folder: Path, wanted: str) -> str:
    """Say what a cache directory has instead of the folder of a data set's losses."""
    if partial_losses_folder(folder).is_dir():
        return "its scoring was begun and is not finished"
    others = [path for path in cache.glob(f"*/{MANIFEST_FILE}") if path.parent.suffix != _PARTIAL]
    return f"it has those of {len(others)} other data set(s)" if others else f"it has no {wanted} at all"


@dataclass(frozen=True)
class CachedLosses:
    """A cache directory, and the manifest of one data set's losses in it."""

    cache: Path
    manifest: LossesManifest


def find_losses(
    cache: Path,
    data_sha256: str,
    data: str,
    *,
    horizon: str,
    columns: int,
    precision: str | None,
    reference_sha256: str | None,
) -> CachedLosses:
    """Find the losses of a data set in a cache directory, and check that they are those that the run needs.

    Args:
        cache: the cache directory.
        data_sha256: fingerprint of the data set.
        data: its name in error messages.
        horizon, columns, precision: that the losses must have; None to accept any precision.
        reference_sha256: fingerprint that the reference must have; None to accept any reference.

    Raises:
        DataError: there are no losses of this data set as it is now, or they were made with another reference or setting.
    """
    manifest = read_losses_manifest(cache, data_sha256, data, horizon=horizon)
    needed = {"horizon": horizon, "columns": columns, "precision": precision, "reference_sha256": reference_sha256}
    for name, value in needed.items():
        found = getattr(manifest, name)
        if value is not None and found != value:
            raise DataError(
                f"{losses_folder(cache, data_sha256)}: the losses of {data} were made with {name} {found} (reference "
                f"{manifest.reference}), this run needs {value}; score the data again into another directory"
            )
    return CachedLosses(cache, manifest)


def check_alike(found: Sequence[CachedLosses]) -> None:
    """Check that the losses of several data sets come from one reference and are stored in one dtype.

    Raises:
        DataError: names two sets that differ.
    """
    for each in found[1:]:
        # The scores of each data set are a file of their own.
        for name in ("dtype",) if each.manifest.horizon == "external" else ("reference_sha256", "dtype"):
            first, other = (getattr(one.manifest, name) for one in (found[0], each))
            if first != other:
                folders = [losses_folder(one.cache, one.manifest.data_sha256) for one in (found[0], each)]
                raise DataError(
                    f"{folders[0]} has {name} {first} (reference {found[0].manifest.reference}), {folders[1]} has {other} "
                    f"(reference {each.manifest.reference}); the sets of one run need the losses of one reference, stored "
                    "alike: score one of them again"
                )


class ReferenceLosses:
    """Reader of a data set's cached losses, by shard and sample index."""

    def __init__(self, cached: CachedLosses, data: Manifest, max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self._folder, self._losses, self._data = losses_folder(cached.cache, cached.manifest.data_sha256), cached.manifest, data
        self._open: LRUCache[int, tuple[int, int]] = LRUCache(max_open_shards, _close)

    def read(self, shard_index: int, sample_index: int) -> np.ndarray:
        """Read and check the losses of one sample: float32 [T, C].

        Raises:
            DataError: the losses are damaged or missing; the message names shard and sample.
            StorageError: the machine cannot read them.
        """
        shard, size = self._data.shards[shard_index], self._losses.sample_bytes
        name = shard.name

        # Bytes and checksum of the sample.
        try:
            losses, crc32 = self._open.get(shard_index, lambda: self._open_shard(name))
            data, expected = os.pread(losses, size, size * sample_index), os.pread(crc32, 4, 4 * sample_index)
        except OSError as error:
            raise_if_machine_fault(error, self._folder, MANIFEST_FILE)
            raise DataError(f"{self._folder / name}.losses: {error.strerror}; score the data again") from None
        if len(data) != size or len(expected) != 4 or self._losses.checksum(shard, data) != int.from_bytes(expected, "little"):
            raise DataError(
                f"the reference losses of shard {name}, sample {sample_index}, in {self._folder} are damaged, or not of this "
                "shard; copy the folder again, or remove it and score the data again"
            )
        stored = np.frombuffer(data, STORED_DTYPES[self._losses.dtype])
        return stored.astype(np.float32).reshape(self._losses.sequence_length, self._losses.columns)

    def blank(self) -> np.ndarray:
        """Make losses for a row of padding, to replace losses that cannot be read: float32 [T, C]."""
        return np.zeros((self._losses.sequence_length, self._losses.columns), np.float32)

    def close(self) -> None:
        """Close all files."""
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
    """A `ShardReader` that reads the cached losses along with the samples. A sample with damaged losses counts as damaged."""

    def __init__(self, reader: ShardReader, cached: CachedLosses, max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self._reader, self._losses = reader, ReferenceLosses(cached, reader.manifest, max_open_shards)

    def read_many(self, shards: Sequence[int], samples: Sequence[int]) -> list[Sample]:
        """Read and check many samples with their losses; arguments and errors as `ShardReader.read_many`."""
        read = zip(self._reader.read_many(shards, samples), shards, samples, strict=True)
        try:
            return [self._with_losses(sample, shard, index) for sample, shard, index in read]
        except StorageError as error:
            raise DataError(str(error)) from None

    def padding(self) -> Sample:
        """Make a row of padding that replaces nothing, with losses that are never used."""
        return replace(self._reader.padding(), reference_losses=self._losses.blank())

    def close(self) -> None:
        """Close all files of samples and losses."""
        self._reader.close()
        self._losses.close()

    def _with_losses(self, sample: Sample, shard: int, index: int) -> Sample:
        try:
            return replace(sample, reference_losses=self._losses.read(shard, index))
        except DataError as error:
            # Without documents the row has no valid pairs, so that its losses are never used.
            none = sample.lengths[:0]
            sources = None if sample.sources is None else sample.sources[:0]
            losses = self._losses.blank()
            return replace(sample, lengths=none, sources=sources, damage=sample.damage or str(error), reference_losses=losses)
