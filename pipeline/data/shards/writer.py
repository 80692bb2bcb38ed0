"""Writing shards: webdataset tars of packed rows, each with an index of offsets and one of checksums.

A shard is three files, all little-endian:

    NAME.tar          samples, each of the members KEY.documents.npy, KEY.sources.npy (if sources are named), KEY.tokens.npy
    NAME.tar.idx      uint64 [samples + 1], the offset of each sample's first header, and the end of the last sample
    NAME.tar.crc32    uint32 [samples], the CRC-32 of each sample's bytes

The tars are byte for byte those of webdataset's `TarWriter` with fixed metadata (a test compares them). Their headers are made
here from one template, because at T = 2048 tarfile's headers would take an eighth of the time of tokenising. The same rows
give the same bytes.

Files are written atomically (`storage.whole_file`), so that a writer killed at any moment leaves no half shard.
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

from pipeline.data.shards.table import Shard, crc32_of_chunks
from pipeline.storage.whole_file import atomic_write, write_file

OFFSET = np.dtype("<u8")
CRC = np.dtype("<u4")
LENGTH = np.dtype("<u4")
SOURCE = np.dtype("|u1")
MAX_SOURCES = 256

_BLOCK = 512
# As tarfile does, a tar ends with at least two empty blocks and is padded to a multiple of this.
_RECORD = 20 * _BLOCK


@dataclass(frozen=True)
class Row:
    """One packed row of D documents. Positions from sum(lengths) on are padding.

    tokens: [T], of any integer type.
    lengths: uint32 [D], tokens of each document.
    sources: uint8 [D], the source of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose the dtype of token ids: uint16 if every id fits, else uint32; little-endian."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def shard_name(index: int) -> str:
    """Name shard `index` of a data set, without `.tar`."""
    return f"shard-{index:05d}"


def write_shards(
    rows: Iterable[Row], directory: Path, *, vocab_size: int, samples_per_shard: int, named_sources: bool
) -> list[Shard]:
    """Write rows to `shard-00000.tar` and so on in `directory`, with their index files; the caller writes the manifest."""
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
    """Write `NAME.tar` and its two index files.

    Args:
        samples: at least one (key, row).
        directory: an existing folder.
        name: of the shard, without `.tar`.
        vocab_size: which decides the dtype of the tokens.
        named_sources: if true, samples have a member for the documents' sources.

    Returns:
        The shard's entry in the manifest.
    """
    dtype = token_dtype(vocab_size)
    offsets, crcs, tokens, sha256 = [0], [], 0, hashlib.sha256()
    path = directory / f"{name}.tar"

    # The tar, hashed while it is written.
    with atomic_write(path) as file:
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

    # The index files.
    write_file(directory / f"{name}.tar.idx", np.array(offsets, OFFSET).tobytes())
    checksums = np.array(crcs, CRC).tobytes()
    write_file(directory / f"{name}.tar.crc32", checksums)
    return Shard(
        name=name,
        samples=len(crcs),
        tokens=tokens,
        bytes=offsets[-1] + len(end),
        sha256=sha256.hexdigest(),
        crc32=crc32_of_chunks(checksums),
    )


def _members(row: Row, tokens: np.dtype, named_sources: bool) -> Iterator[tuple[str, bytes]]:
    # Sorted by name, as TarWriter does it.
    yield "documents.npy", _to_npy(row.lengths.astype(LENGTH, copy=False))
    if named_sources:
        yield "sources.npy", _to_npy(row.sources.astype(SOURCE, copy=False))
    yield "tokens.npy", _to_npy(row.tokens.astype(tokens, copy=False))


def _member(name: str, content: bytes) -> bytes:
    return _header(name.encode("ascii"), len(content)) + content + bytes(-len(content) % _BLOCK)


@lru_cache(maxsize=1)
def _header_template() -> tuple[bytearray, int]:
    """Make a ustar header without name, size and checksum, and the sum of its bytes, with spaces for the checksum."""
    header = bytearray(_BLOCK)
    header[100:124] = b"0000644\x000000000\x000000000\x00"  # mode, user, group
    header[136:148] = b"00000000000\x00"  # time of change
    header[148:156] = b" " * 8  # checksum
    header[156:157] = b"0"  # a plain file
    header[257:265] = b"ustar\x0000"  # magic and version
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
