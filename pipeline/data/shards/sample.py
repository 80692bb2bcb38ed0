"""Decoding one sample: from the bytes between two offsets of a tar to checked arrays.

The tar headers of a sample are parsed here, in a twentieth of the time of a tar library. Members other than plain ustar files
(long names, pax records) are left to webdataset's own expander. Links, devices, names that point outside and sizes that exceed
the data are treated as damage, because no honest writer makes them. Arrays are decoded here and never unpickled: webdataset's
`.decode()` would execute the contents of a pickle.
"""

import ast
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.writer import LENGTH, SOURCE, token_dtype

_MAGIC = b"\x93NUMPY\x01\x00"
_BLOCK = 512
_PLAIN, _EXTENSIONS = (b"0", b"\0"), (b"x", b"g", b"L")


class DamageError(Exception):
    """The bytes of a sample are damaged; the message says what is wrong with them."""


@dataclass(frozen=True)
class Sample:
    """One row as stored, with D documents. The arrays are read-only.

    key: `SHARD/KEY`.
    tokens: uint16 or uint32 [T].
    lengths: uint32 [D], tokens of each document.
    sources: uint8 [D], the source of each document; None where the data has no named sources.
    damage: None, or the error message of a damaged row, which this row of padding replaces.
    reference_losses: float32 [T, C], the cached losses (`shards.reference_losses`); None where none are read.
    number: its place among all samples of the data, in the manifest's order, also of a damaged one; -1 of mere padding.
    """

    key: str
    tokens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray | None
    damage: str | None = None
    reference_losses: np.ndarray | None = None
    number: int = -1


class SampleDecoder:
    """Decoder of the samples of one data set; it checks them against the manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._tokens = token_dtype(manifest.vocab_size)
        self._vocab_size = manifest.vocab_size
        self._sequence_length = manifest.sequence_length
        self._num_sources = len(manifest.sources)
        self._names = {"tokens.npy", "documents.npy"} | ({"sources.npy"} if manifest.sources else set())
        largest_id = np.iinfo(self._tokens).max
        self._any_id_fits = largest_id < manifest.vocab_size
        # At most T tokens (dtype), T document lengths (4 bytes) and T sources (1 byte), and for each of the three members eight
        # blocks of headers, pax records and padding.
        self.max_bytes = manifest.sequence_length * (self._tokens.itemsize + 4 + 1) + 3 * 8 * _BLOCK

    def decode(self, data: bytes, shard: str, number: int = -1) -> Sample:
        """Decode the tar blocks of one sample. number: `Sample.number`.

        Raises:
            DamageError: `data` is not exactly one sample, or does not fit the manifest.
        """
        key, members = members_of(data)
        if members.keys() != self._names:
            raise DamageError(f"expected the members {sorted(self._names)}, got {sorted(members)}")
        tokens = _from_npy(members["tokens.npy"], self._tokens, "tokens")
        lengths = _from_npy(members["documents.npy"], LENGTH, "documents")
        sources = _from_npy(members["sources.npy"], SOURCE, "sources") if self._num_sources else None
        self._check(tokens, lengths, sources)
        return Sample(f"{shard}/{key}", tokens, lengths, sources, number=number)

    def blank(self, key: str, damage: str | None, number: int = -1) -> Sample:
        """Make a row of padding, which has no valid pairs. damage: what is wrong with the sample it replaces, if any."""
        sources = np.zeros(0, SOURCE) if self._num_sources else None
        tokens = np.zeros(self._sequence_length, self._tokens)
        return Sample(key, tokens, np.zeros(0, LENGTH), sources, damage, number=number)

    def _check(self, tokens: np.ndarray, lengths: np.ndarray, sources: np.ndarray | None) -> None:
        if len(tokens) != self._sequence_length:
            raise DamageError(f"expected {self._sequence_length} tokens (the sequence length), got {len(tokens)}")
        if not self._any_id_fits and tokens.max() >= self._vocab_size:
            raise DamageError(f"token id {tokens.max()} is not below the manifest's vocab_size {self._vocab_size}")

        # For a few documents Python's sum is faster than numpy's, and it cannot overflow.
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
    """Split the tar blocks of one sample into its key and its members by name.

    Raises:
        DamageError: `data` is not the tar blocks of exactly one sample.
    """
    key, members, position = None, {}, 0
    is_plain = True
    while position < len(data):
        # The header, and the extent of the member.
        header = data[position : position + _BLOCK]
        kind, size = _kind_and_size(header)
        start = position + _BLOCK
        if size > len(data) - start:
            raise DamageError(f"a member claims {size} bytes, {len(data) - start} are there")
        if kind in _EXTENSIONS and b"GNU.sparse" in data[start : start + size]:
            # A tar library would fill the holes, perhaps with gigabytes of zeros, before anything can be checked.
            raise DamageError("a member that is a sparse file")
        position = start + -(-size // _BLOCK) * _BLOCK
        is_plain = is_plain and kind in _PLAIN
        if not is_plain:
            continue  # an extension header may give the member another name

        # Its key and name.
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

    # The checksum of a header is the sum of its bytes, with eight spaces (256 in sum) in the place of the checksum.
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
    """Split a member's path into key and name by webdataset's rule: at the first dot of the file name."""
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
    # webdataset imports torch, which takes seconds and which commands that read no sample need not wait for.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    return group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(data)}]))


def _from_npy(data: bytes, dtype: np.dtype, what: str) -> np.ndarray:
    # Not np.load, which allocates the array that the header claims before it checks how many bytes there are.
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
        # An integer of some thousand digits cannot be printed, so unusual values are shown as the header's text.
        is_printable = isinstance(found, str) and is_vector and shape[0] < 2**63
        text = f"{found!r} with shape {shape}" if is_printable else header[len(_MAGIC) + 2 :].decode("ascii")
        raise DamageError(f"{what}.npy is an array of {text[:120].strip()}, expected {dtype!r} with one dimension")
    return shape
