"""Write and read one rank's file of fragments, in the safetensors format, hashing what goes by.

Own code for a published format of a dozen lines, because the library can neither hash while it writes nor read into memory that
is there already: a checkpoint is as large as what an engine holds, so each byte is touched once, and nothing is held twice.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.storage.whole_file import atomic_write

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_CHUNK = 2**24
_LARGEST_HEADER = 10**8


class FileError(ValueError):
    """A file of fragments is not what it should be."""


class Entry(NamedTuple):
    """A tensor in a file. offset: of its first byte in the file."""

    dtype: torch.dtype
    offset: int
    numel: int


class Piece(NamedTuple):
    """Bytes of a file, and the memory that they belong in. offset: in the file. target: 1-D, contiguous, on any device."""

    offset: int
    target: Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write 1-D tensors of any device atomically, synced; returns (bytes, SHA-256) of the file."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    digest, size = hashlib.sha256(), 0
    with atomic_write(path) as file:
        for block in _blocks([len(encoded).to_bytes(8, "little"), encoded], tensors.values()):
            file.write(block)
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _blocks(head: Iterable[bytes], tensors: Iterable[Tensor]) -> Iterable[memoryview]:
    yield from (memoryview(part) for part in head)
    for tensor in tensors:
        yield from (_bytes_of(part.cpu()) for part in tensor.split(_CHUNK // tensor.element_size()))


def read_header(path: Path) -> dict[str, Entry]:
    """Read where each tensor lies in the file.

    Raises:
        FileError: the file is no safetensors file of these dtypes, or one that was cut. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            raise FileError("no header of a safetensors file")
        header = file.read(length)
    try:
        entries = {name: _entry(8 + length, **entry) for name, entry in json.loads(header).items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError("a damaged header") from error
    if any(entry.offset + entry.numel * entry.dtype.itemsize > size for entry in entries.values()):
        raise FileError("tensors beyond its end")
    return entries


def _entry(data_begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    (numel,), (begin, end) = shape, data_offsets
    entry = Entry(_DTYPES[dtype], data_begin + begin, numel)
    if not begin >= 0 or numel * entry.dtype.itemsize != end - begin:
        raise ValueError("offsets that do not fit the shape")
    return entry


def read_pieces(path: Path, pieces: Sequence[Piece], *, hashed: bool) -> str | None:
    """Read pieces of a file into their memory.

    hashed: read the whole file and return its SHA-256, so that what was hashed is what was read; else return None.

    Raises:
        FileError: the file ends within a piece. OSError: it cannot be read.
    """
    digest, position = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        for offset, target in sorted(pieces, key=lambda piece: piece.offset):
            if hashed:
                _hash(file.fileno(), position, offset, digest)
            _fill(file.fileno(), offset, target, digest if hashed else None)
            position = offset + target.nbytes
        if hashed:
            _hash(file.fileno(), position, os.fstat(file.fileno()).st_size, digest)
    return digest.hexdigest() if hashed else None


def _fill(descriptor: int, offset: int, target: Tensor, digest: "hashlib._Hash | None") -> None:
    """Read a tensor's bytes; on a device by way of the host, a chunk at a time."""
    size = target.element_size()
    for part in target.detach().split(_CHUNK // size):
        on_host = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
        data = _bytes_of(on_host)
        _read_exactly(descriptor, offset, data)
        if digest is not None:
            digest.update(data)
        if on_host is not part:
            part.copy_(on_host)
        offset += part.nbytes


def _hash(descriptor: int, begin: int, end: int, digest: "hashlib._Hash") -> None:
    buffer = memoryview(bytearray(min(_CHUNK, max(0, end - begin))))
    while begin < end:
        part = buffer[: min(len(buffer), end - begin)]
        _read_exactly(descriptor, begin, part)
        digest.update(part)
        begin += len(part)


def _read_exactly(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        num_bytes = os.preadv(descriptor, [data], offset)
        if num_bytes == 0:
            raise FileError("it ends too early")
        data, offset = data[num_bytes:], offset + num_bytes


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
