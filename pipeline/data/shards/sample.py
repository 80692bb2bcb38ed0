"""One row as it lies in a shard: from the bytes between two offsets to arrays that are known to be right.

The members are found by walking the few tar headers of the sample, which takes a twentieth of the time of a tar library.
Whatever is not a plain ustar file member (long names, pax records) is left to webdataset's own expander; what no honest
writer puts there (links, devices, names that point outside, members that claim more than there is) is damage. Arrays are
decoded here and never unpickled: webdataset's `.decode()` would run what a pickle says.
"""

import ast
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.writer import LENGTH, SOURCE, token_dtype

_MAGIC = b"\x93NUMPY\x01\x00"
_BLOCK = 512
_PLAIN, _EXTENSIONS = (b"0", b"\0"), (b"x", b"g", b"L")


class DamageError(Exception):
    """What is wrong with a sample's bytes."""


@dataclass(frozen=True)
class Sample:
    """One row as stored: `key` is `SHARD/KEY`; `tokens` uint16 or uint32 [T]; `lengths` uint32 and `sources` uint8 [D].

    `sources` is None where the data has no named sources. The arrays are read-only. `damage` is None, or says what was
    wrong with the row in whose place this one stands, which is all padding. `reference_losses`, float32 [T, C], are those of
    `pipeline.data.shards.reference_losses`, where they are read along.
    """

    key: str
    tokens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None
    damage: str | None = None
    reference_losses: np.ndarray | None = None


class SampleDecoder:
    """Decodes and checks the samples of one data set."""

    def __init__(self, manifest: Manifest) -> None:
        self._tokens = token_dtype(manifest.vocab_size)
        self._vocab_size = manifest.vocab_size
        self._sequence_length = manifest.sequence_length
        self._num_sources = len(manifest.sources)
        self._names = {"tokens.npy", "documents.npy"} | ({"sources.npy"} if manifest.sources else set())
        largest_id = np.iinfo(self._tokens).max
        self._any_id_fits = largest_id < manifest.vocab_size
        # Tokens, and as many documents as tokens; each member with headers, pax records and their padding.
        self.max_bytes = manifest.sequence_length * (self._tokens.itemsize + 4 + 1) + 3 * 8 * _BLOCK

    def decode(self, data: bytes, shard: str) -> Sample:
        """The sample whose members `data` holds, all of it.

        Raises:
            DamageError: it is not one sample, or does not fit the manifest.
        """
        key, members = members_of(data)
        if members.keys() != self._names:
            raise DamageError(f"expected the members {sorted(self._names)}, got {sorted(members)}")
        tokens = _from_npy(members["tokens.npy"], self._tokens, "tokens")
        lengths = _from_npy(members["documents.npy"], LENGTH, "documents")
        sources = _from_npy(members["sources.npy"], SOURCE, "sources") if self._num_sources else None
        self._check(tokens, lengths, sources)
        return Sample(f"{shard}/{key}", tokens, lengths, sources)

    def blank(self, key: str, damage: str) -> Sample:
        """A row without valid pairs, in the place of one that is damaged."""
        sources = np.zeros(0, SOURCE) if self._num_sources else None
        return Sample(key, np.zeros(self._sequence_length, self._tokens), np.zeros(0, LENGTH), sources, damage)

    def _check(self, tokens: np.ndarray, lengths: np.ndarray, sources: np.ndarray | None) -> None:
        if len(tokens) != self._sequence_length:
            raise DamageError(f"expected {self._sequence_length} tokens (the sequence length), got {len(tokens)}")
        if not self._any_id_fits and tokens.max() >= self._vocab_size:
            raise DamageError(f"token id {tokens.max()} is not below the manifest's vocab_size {self._vocab_size}")
        # A few documents: Python's own sum is faster than numpy's, and cannot overflow.
        each = lengths.tolist()
        total = sum(each)
        if 0 in each:
            raise DamageError("a document of length 0")
        if total > self._sequence_length:
            raise DamageError(f"documents of {total} tokens in a row of {self._sequence_length}")
        if sources is not None and len(sources) != len(lengths):
            raise DamageError(f"{len(lengths)} documents but {len(sources)} sources")
        if sources is not None and len(sources) and sources.max() >= self._num_sources:
            raise DamageError(f"source {sources.max()}, but the manifest names {self._num_sources}")


def members_of(data: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of the one sample in `data`, and its members by name.

    Raises:
        DamageError: these are not the tar blocks of one sample.
    """
    key, members, position = None, {}, 0
    is_plain = True
    while position < len(data):
        header = data[position : position + _BLOCK]
        kind, size = _kind_and_size(header)
        start = position + _BLOCK
        if size > len(data) - start:
            raise DamageError(f"a member claims {size} bytes, {len(data) - start} are there")
        if kind in _EXTENSIONS and b"GNU.sparse" in data[start : start + size]:
            # Whatever reads it would fill its holes, gigabytes perhaps, before anything can be checked.
            raise DamageError("a member that is a sparse file")
        position = start + -(-size // _BLOCK) * _BLOCK
        is_plain = is_plain and kind in _PLAIN
        if not is_plain:
            continue  # its name may be a stand-in for a longer one
        own_key, member = _split(_name_of(header))
        if key is not None and own_key != key:
            raise DamageError(f"expected one sample between its offsets, got the keys {key} and {own_key}")
        key = own_key
        if member in members:
            raise DamageError(f"the member {member} is there twice")
        members[member] = data[start : start + size]
    if position != len(data):
        raise DamageError(f"its last member ends {position - len(data)} bytes beyond it")
    if not is_plain:
        return _members_by_webdataset(data)
    if key is None:
        raise DamageError("it is empty")
    return key, members


def _kind_and_size(header: bytes) -> tuple[bytes, int]:
    if len(header) < _BLOCK:
        raise DamageError(f"its last tar header is cut to {len(header)} bytes")
    kind, checksum = header[156:157], header[148:156]
    try:
        if _octal(checksum) != sum(header) - sum(checksum) + 256:
            raise DamageError("a tar header does not have its checksum")
        size = _octal(header[124:136])
    except ValueError:
        raise DamageError("its bytes are not a tar: a header has no number where one belongs") from None
    if size < 0:
        raise DamageError(f"a member claims {size} bytes")
    if kind not in _PLAIN and kind not in _EXTENSIONS:
        raise DamageError(f"a member that is no file: {_name_of(header)!r}, of type {kind!r}")
    return kind, size


@lru_cache(maxsize=4096)
def _octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name_of(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _split(name: str) -> tuple[str, str]:
    """A member's key and its name in the sample, by webdataset's rule: the first dot of the file's name divides them."""
    folder, slash, file = name.rpartition("/")
    base, dot, member = file.partition(".")
    if not base or not dot:
        raise DamageError(f"a member named {name!r}, expected KEY.NAME")
    if name.startswith("/") or ".." in folder.split("/"):
        raise DamageError(f"a member whose name points outside: {name!r}")
    return folder + slash + base, member.lower()


def _members_by_webdataset(data: bytes) -> tuple[str, dict[str, Any]]:
    try:
        samples = list(_expand(data))
    except Exception as error:  # tarfile and webdataset raise many kinds, among them plain ValueError
        raise DamageError(f"its bytes are not a tar of one sample ({error})") from None
    if len(samples) != 1:
        raise DamageError(f"expected one sample between its offsets, got {len(samples)}")
    key, _ = _split(f"{samples[0]['__key__']}.npy")
    return key, {name: value for name, value in samples[0].items() if not name.startswith("__")}


def _expand(data: bytes) -> Iterator[dict[str, Any]]:
    return group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(data)}]))


def _from_npy(data: bytes, dtype: np.dtype, what: str) -> np.ndarray:
    # Not np.load: it sizes the array by what the header claims, before it looks at how many bytes there are.
    header_end = len(_MAGIC) + 2 + int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    shape = _shape_from_header(data[:header_end], dtype.str, what)
    if len(data) - header_end != math.prod(shape) * dtype.itemsize:
        raise DamageError(f"{what}.npy has {max(0, len(data) - header_end)} bytes of data, expected {shape} of {dtype}")
    return np.frombuffer(data, dtype, offset=header_end) if shape[0] else np.zeros(0, dtype)


@lru_cache(maxsize=1024)
def _shape_from_header(header: bytes, dtype: str, what: str) -> tuple[int]:
    try:
        fields = ast.literal_eval(header[len(_MAGIC) + 2 :].decode("ascii"))
        found, shape = fields["descr"], fields["shape"]
        is_vector = len(shape) == 1 and isinstance(shape[0], int) and shape[0] >= 0
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise DamageError(f"{what}.npy has no npy header of version 1.0") from None
    if not header.startswith(_MAGIC) or found != dtype or not is_vector or shape[0] >= 2**63:
        # A number of some thousand digits cannot be printed: whatever is strange is shown as the header has it.
        is_usual = isinstance(found, str) and is_vector and shape[0] < 2**63
        text = f"{found!r} with shape {shape}" if is_usual else header[len(_MAGIC) + 2 :].decode("ascii")
        raise DamageError(f"{what}.npy is an array of {text[:120].strip()}, expected {dtype!r} with one dimension")
    return shape
