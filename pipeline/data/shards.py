"""Writes shards: webdataset tars of packed rows, with what a reader needs to start at any sample and to believe nothing.

Written with webdataset's `TarWriter` and fixed metadata, so that the same rows give the same bytes. Beside `NAME.tar` lie
`NAME.tar.idx` (uint64 offsets of every sample's first header, and of the end of the last) and `NAME.tar.crc32` (uint32 of
every sample's bytes), both little-endian. `shard_reader` reads them.
"""

import hashlib
import io
import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from pipeline.data.manifest import Shard
from pipeline.data.packing import Row

OFFSET = np.dtype("<u8")
CRC = np.dtype("<u4")
LENGTH = np.dtype("<u4")
SOURCE = np.dtype("|u1")
MAX_SOURCES = 256


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def write_shards(
    rows: Iterable[Row], directory: Path, *, vocab_size: int, samples_per_shard: int, named_sources: bool
) -> list[Shard]:
    """Write rows to `shard-00000.tar` and so on in `directory`, with their indices; the manifest is the caller's."""
    numbered = enumerate(rows)
    shards: list[Shard] = []
    while samples := list(itertools.islice(numbered, samples_per_shard)):
        name = f"shard-{len(shards):05d}"
        offsets = _write_tar(directory / f"{name}.tar", samples, token_dtype(vocab_size), named_sources)
        tokens = sum(int(row.lengths.sum()) for _, row in samples)
        shards.append(_index_tar(directory / f"{name}.tar", name, tokens, offsets))
    return shards


def _write_tar(path: Path, samples: list[tuple[int, Row]], tokens: np.dtype, named_sources: bool) -> np.ndarray:
    offsets = []
    with path.open("wb") as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for number, row in samples:
            offsets.append(writer.tarstream.offset)
            writer.write({"__key__": f"{number:09d}", **_members(row, tokens, named_sources)})
        offsets.append(writer.tarstream.offset)
    return np.array(offsets, OFFSET)


def _members(row: Row, tokens: np.dtype, named_sources: bool) -> dict[str, bytes]:
    members = {
        "tokens.npy": _to_npy(row.tokens.astype(tokens)),
        "documents.npy": _to_npy(row.lengths.astype(LENGTH)),
    }
    if named_sources:
        members["sources.npy"] = _to_npy(row.sources.astype(SOURCE))
    return members


def _to_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _index_tar(path: Path, name: str, tokens: int, offsets: np.ndarray) -> Shard:
    data = path.read_bytes()
    view = memoryview(data)
    crcs = [zlib.crc32(view[start:end]) for start, end in itertools.pairwise(offsets.tolist())]
    path.with_name(f"{name}.tar.idx").write_bytes(offsets.tobytes())
    path.with_name(f"{name}.tar.crc32").write_bytes(np.array(crcs, CRC).tobytes())
    sha256 = hashlib.sha256(data).hexdigest()
    return Shard(name=name, samples=len(crcs), tokens=tokens, bytes=len(data), sha256=sha256)
