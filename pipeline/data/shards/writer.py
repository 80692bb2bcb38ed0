"""Writing shards: webdataset tars of packed rows, and beside each its offsets and checksums.

Beside `NAME.tar` lie `NAME.tar.idx` (uint64 offsets of every sample's first header, and of the end of the last) and
`NAME.tar.crc32` (uint32 of every sample's bytes), both little-endian.

The tars are byte for byte those of webdataset's `TarWriter` with fixed metadata (a test holds them against each other), but
their headers are made here from one template: at T = 2048 tarfile's own would take an eighth of the time of tokenising. The
same rows give the same bytes.

A file gets its name when it is complete and on the disk (`storage.whole_file`), so that a writer killed at any moment leaves no
half shard.
"""

import hashlib
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.data.shards.table import Shard, crc32_of_pieces
from pipeline.storage.whole_file import whole_file, write_file

OFFSET = np.dtype("<u8")
CRC = np.dtype("<u4")
LENGTH = np.dtype("<u4")
SOURCE = np.dtype("|u1")
MAX_SOURCES = 256

_BLOCK = 512
# tarfile fills its tars up to a multiple of this, and at least two empty blocks.
_RECORD = 20 * _BLOCK


@dataclass(frozen=True)
class Row:
    """One packed row: `tokens` [T]; `lengths` uint32 and `sources` uint8, one entry for each document in it.

    Positions from sum(lengths) on are padding.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def shard_name(index: int) -> str:
    """Name of a data set's shard, without `.tar`."""
    return f"shard-{index:05d}"


def write_shards(
    rows: Iterable[Row], directory: Path, *, vocab_size: int, samples_per_shard: int, named_sources: bool
) -> list[Shard]:
    """Write rows to `shard-00000.tar` and so on in `directory`, with their indices; the manifest is the caller's."""
    remaining, shards = iter(rows), list[Shard]()
    while first := next(remaining, None):
        in_shard = itertools.chain([first], itertools.islice(remaining, samples_per_shard - 1))
        keys = (f"{number:09d}" for number in itertools.count(len(shards) * samples_per_shard))
        shards.append(
            write_shard(
                zip(keys, in_shard, strict=False),
                directory,
                shard_name(len(shards)),
                vocab_size=vocab_size,
                named_sources=named_sources,
            )
        )
    return shards


def write_shard(
    samples: Iterable[tuple[str, Row]], directory: Path, name: str, *, vocab_size: int, named_sources: bool
) -> Shard:
    """Write `NAME.tar` with its two index files from keys and their rows, of which there must be at least one."""
    dtype = token_dtype(vocab_size)
    offsets, crcs, tokens, sha256 = [0], [], 0, hashlib.sha256()
    path = directory / f"{name}.tar"
    with whole_file(path) as file:
        for key, row in samples:
            data = b"".join(_member(f"{key}.{member}", content) for member, content in _members(row, dtype, named_sources))
            file.write(data)
            sha256.update(data)
            crcs.append(zlib.crc32(data))
            offsets.append(offsets[-1] + len(data))
            tokens += int(row.lengths.sum(dtype=np.uint64))
        end = bytes(-(offsets[-1] + 2 * _BLOCK) % _RECORD + 2 * _BLOCK)
        file.write(end)
        sha256.update(end)
    write_file(directory / f"{name}.tar.idx", np.array(offsets, OFFSET).tobytes())
    checksums = np.array(crcs, CRC).tobytes()
    write_file(directory / f"{name}.tar.crc32", checksums)
    return Shard(
        name=name,
        samples=len(crcs),
        tokens=tokens,
        bytes=offsets[-1] + len(end),
        sha256=sha256.hexdigest(),
        crc32=crc32_of_pieces(checksums),
    )


def _members(row: Row, tokens: np.dtype, named_sources: bool) -> Iterator[tuple[str, bytes]]:
    # In the order of their names, as TarWriter has them.
    yield "documents.npy", _to_npy(row.lengths.astype(LENGTH, copy=False))
    if named_sources:
        yield "sources.npy", _to_npy(row.sources.astype(SOURCE, copy=False))
    yield "tokens.npy", _to_npy(row.tokens.astype(tokens, copy=False))


def _member(name: str, content: bytes) -> bytes:
    return _header(name.encode("ascii"), len(content)) + content + bytes(-len(content) % _BLOCK)


@lru_cache(maxsize=1)
def _header_template() -> tuple[bytearray, int]:
    """A ustar header of a file without name, size and checksum, and the sum of its bytes, those of the checksum as spaces."""
    header = bytearray(_BLOCK)
    header[100:124] = b"0000644\x000000000\x000000000\x00"
    header[136:148] = b"00000000000\x00"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return header, sum(header)


def _header(name: bytes, size: int) -> bytes:
    assert len(name) <= 100
    template, base_sum = _header_template()
    header = template.copy()
    digits = b"%011o\x00" % size
    header[: len(name)] = name
    header[124:136] = digits
    header[148:156] = b"%06o\x00 " % (base_sum + sum(name) + sum(digits))
    return bytes(header)


def _to_npy(array: np.ndarray) -> bytes:
    return _npy_header(array.dtype.str, len(array)) + array.tobytes()


@lru_cache(maxsize=4096)
def _npy_header(dtype: str, length: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    return stream.getvalue()
