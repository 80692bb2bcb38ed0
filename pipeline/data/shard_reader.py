"""Reads shards of packed rows (`shards`), begins at any sample and believes nothing.

Tar readers pass over a cut between members and a flipped bit without a word. Here a sample's bytes are those between two
offsets, all of them, with the CRC-32 written when the shard was made; only then are they given to webdataset's own tar
expander, and what comes out is held against the manifest. Arrays are decoded here and never unpickled: webdataset's
`.decode()` would run what a pickle says.

The reader keeps no index in memory: it reads the two offsets and the CRC by position too, so its memory does not grow with
a shard, nor its open files with the number of shards.
"""

import ast
import io
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.cache import LeastRecentlyUsed
from pipeline.data.manifest import DataError, Manifest, Shard
from pipeline.data.shards import CRC, LENGTH, OFFSET, SOURCE, token_dtype

_MAX_OPEN_SHARDS = 64
_MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True)
class Sample:
    """One row as stored: `key` is `SHARD/KEY`; `tokens` uint16 or uint32 [T]; `lengths` uint32 and `sources` uint8 [D].

    `sources` is None where the data has no named sources. The arrays are read-only.
    """

    key: str
    tokens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None


class ShardReader:
    """Reads samples of a prepared folder by shard and sample index, from at most `max_open_shards` shards (3 files each)."""

    def __init__(self, directory: Path, manifest: Manifest, max_open_shards: int = _MAX_OPEN_SHARDS) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        self._open: LeastRecentlyUsed[int, _OpenShard] = LeastRecentlyUsed(max_open_shards, _OpenShard.close)

    def read(self, shard_index: int, sample_index: int) -> Sample:
        """Read and check one sample.

        Raises:
            DataError: the sample is damaged or does not fit the manifest; the message names shard and sample.
            IndexError: the manifest has no such sample.
        """
        shard = self.manifest.shards[shard_index]
        if not 0 <= sample_index < shard.samples:
            raise IndexError(f"shard {shard.name} has samples 0 to {shard.samples - 1}, not {sample_index}")
        try:
            opened = self._open.get(shard_index, lambda: _OpenShard(self.directory / f"{shard.name}.tar"))
            return _to_sample(_members_of(opened.read(sample_index)), shard, self.manifest)
        except (_DamageError, OSError) as damage:
            raise DataError(
                f"shard {shard.name}, sample {sample_index}, in {self.directory} is damaged: {damage}; "
                "copy the shard and its .idx and .crc32 again from where the data was prepared, or prepare again"
            ) from None

    def close(self) -> None:
        """Close all files; reading opens them again."""
        self._open.clear()


class _DamageError(Exception):
    pass


class _OpenShard:
    # pread, and no seek: a descriptor's position would be shared with a forked DataLoader worker.
    def __init__(self, path: Path) -> None:
        self._files: list[int] = []
        try:
            for suffix in ("", ".idx", ".crc32"):
                self._files.append(os.open(f"{path}{suffix}", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        except OSError:
            self.close()
            raise

    def read(self, sample: int) -> bytes:
        tar, idx, crc32 = self._files
        start, end = np.frombuffer(_read_exactly(idx, 16, 8 * sample, "its .idx"), OFFSET).tolist()
        if not start < end <= os.fstat(tar).st_size:
            raise _DamageError(f"its .idx puts it at bytes {start} to {end} of {os.fstat(tar).st_size}")
        data = _read_exactly(tar, end - start, start, "the tar")
        expected = int(np.frombuffer(_read_exactly(crc32, 4, 4 * sample, "its .crc32"), CRC)[0])
        if zlib.crc32(data) != expected:
            raise _DamageError(f"its CRC-32 is {zlib.crc32(data):08x}, expected {expected:08x}")
        return data

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def _read_exactly(file: int, size: int, offset: int, what: str) -> bytes:
    data = os.pread(file, size, offset)
    while 0 < len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise _DamageError(f"expected {size} bytes at {offset} of {what}, got {len(data)}")
    return data


def _members_of(data: bytes) -> dict[str, Any]:
    try:
        samples = list(_expand(data))
    except Exception as error:  # tarfile and webdataset raise many kinds, among them plain ValueError
        raise _DamageError(f"its bytes are not a tar of one sample ({error})") from None
    if len(samples) != 1:
        raise _DamageError(f"expected one sample between its offsets, got {len(samples)}")
    return samples[0]


def _expand(data: bytes) -> Iterator[dict[str, Any]]:
    return group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(data)}]))


def _to_sample(members: dict[str, Any], shard: Shard, manifest: Manifest) -> Sample:
    found = {name for name in members if not name.startswith("__")}
    expected = {"tokens.npy", "documents.npy"} | ({"sources.npy"} if manifest.sources else set())
    if found != expected:
        raise _DamageError(f"expected the members {sorted(expected)}, got {sorted(found)}")
    tokens = _from_npy(members["tokens.npy"], token_dtype(manifest.vocab_size), "tokens")
    lengths = _from_npy(members["documents.npy"], LENGTH, "documents")
    sources = _from_npy(members["sources.npy"], SOURCE, "sources") if manifest.sources else None
    _check_values(tokens, lengths, sources, manifest)
    return Sample(f"{shard.name}/{members['__key__']}", tokens, lengths, sources)


def _check_values(tokens: np.ndarray, lengths: np.ndarray, sources: np.ndarray | None, manifest: Manifest) -> None:
    if len(tokens) != manifest.sequence_length:
        raise _DamageError(f"expected {manifest.sequence_length} tokens (the sequence length), got {len(tokens)}")
    if tokens.max() >= manifest.vocab_size:
        raise _DamageError(f"token id {tokens.max()} is not below the manifest's vocab_size {manifest.vocab_size}")
    if (lengths == 0).any():
        raise _DamageError("a document of length 0")
    if lengths.sum(dtype=np.uint64) > manifest.sequence_length:
        raise _DamageError(f"documents of {lengths.sum(dtype=np.uint64)} tokens in a row of {manifest.sequence_length}")
    if sources is not None and len(sources) != len(lengths):
        raise _DamageError(f"{len(lengths)} documents but {len(sources)} sources")
    if sources is not None and (sources >= len(manifest.sources)).any():
        raise _DamageError(f"source {sources.max()}, but the manifest names {len(manifest.sources)}")


def _from_npy(data: bytes, dtype: np.dtype, what: str) -> np.ndarray:
    # Not np.load: it sizes the array by what the header claims, before it looks at how many bytes there are.
    header_end = len(_MAGIC) + 2 + int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    shape = _shape_from_header(data[:header_end], dtype.str, what)
    payload = data[header_end:]
    if len(payload) != math.prod(shape) * dtype.itemsize:
        raise _DamageError(f"{what}.npy has {len(payload)} bytes of data, expected {shape} of {dtype}")
    return np.frombuffer(payload, dtype)


@lru_cache(maxsize=1024)
def _shape_from_header(header: bytes, dtype: str, what: str) -> tuple[int]:
    try:
        fields = ast.literal_eval(header[len(_MAGIC) + 2 :].decode("ascii"))
        found, shape = fields["descr"], fields["shape"]
        is_vector = len(shape) == 1 and isinstance(shape[0], int) and shape[0] >= 0
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise _DamageError(f"{what}.npy has no npy header of version 1.0") from None
    if not header.startswith(_MAGIC) or found != dtype or not is_vector:
        raise _DamageError(f"{what}.npy is an array of {found!r} with shape {shape}, expected {dtype!r} with one dimension")
    return shape
