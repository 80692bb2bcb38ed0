"""The shards of a manifest, as columns: a data set of twenty trillion tokens has a million of them.

A million records validated one by one take half a minute and two gigabytes. Here the JSON's objects become columns while
they are parsed, and the rules are applied to a whole column at a time. What is not as it should be is left to pydantic,
record by record, so that the rules and their messages have one owner.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Names become file names: a manifest from elsewhere must not be able to point outside its folder.
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
FileName = Annotated[str, Field(pattern=f"^{NAME}$")]
# Below these bounds sums over a million shards, and products with the sizes of items, stay within int64.
_MOST_SAMPLES, _MOST_BYTES = 2**32, 2**42
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=_MOST_SAMPLES)]
OfShard = Annotated[int, Field(ge=0, lt=_MOST_BYTES)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

INDEX_CHUNK_SAMPLES = 1024
"""Samples whose part of the index files is read, and compared with the manifest, at a time."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(Record):
    """One tar, `NAME.tar`, of `bytes` bytes; `tokens` are without padding. `crc32` has 8 hexadecimal digits for every piece of
    `NAME.tar.crc32`, 1,024 samples each, its CRC-32. It ties the checksums, and by them the samples, to this manifest, and
    whoever reads some samples need not read the checksums of all to see that; folders made before it was thought of have
    none."""

    name: FileName
    samples: Positive
    tokens: OfShard
    bytes: Annotated[OfShard, Field(ge=1)]
    sha256: Sha256
    crc32: Annotated[str, Field(pattern="^[0-9a-f]+$")] | None = None

    @field_validator("crc32")
    @classmethod
    def _has_all_pieces(cls, crc32: str | None, info: ValidationInfo) -> str | None:
        if crc32 is not None and "samples" in info.data and len(crc32) != _num_digits(info.data["samples"]):
            raise ValueError(
                f"expected {_num_digits(info.data['samples'])} digits, 8 for each {INDEX_CHUNK_SAMPLES:,} samples, "
                f"got {len(crc32)}"
            )
        return crc32


def crc32_of_chunks(checksums: bytes) -> str:
    """`Shard.crc32` of a shard whose `.crc32` has these bytes."""
    size = 4 * INDEX_CHUNK_SAMPLES
    return "".join(f"{zlib.crc32(checksums[start : start + size]):08x}" for start in range(0, len(checksums), size))


def _num_digits(samples: int) -> int:
    return 8 * -(-samples // INDEX_CHUNK_SAMPLES)


_FIELDS = tuple(Shard.model_fields)
_SHARDS_AT_ONCE = 1 << 14


@dataclass(frozen=True, eq=False)
class ShardTable(Sequence[Shard]):
    """Shards in the manifest's order, as rows of a numpy structured array.

    The CRC-32s of the pieces of their checksums, 4 bytes each, lie apart, because shards have different numbers of them:
    `chunks_before` is that number before every shard and at the end, none being there for a shard without.
    """

    rows: np.ndarray
    crc32s: bytes
    chunks_before: np.ndarray

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "ShardTable":
        """Return the table of these shards."""
        if isinstance(shards, ShardTable):
            return shards
        return cls._from_columns(*zip(*map(_values, shards), strict=True)) if shards else cls.joined([])

    @classmethod
    def joined(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """Return the shards of all these tables, one after the other."""
        num_pieces = [np.diff(table.chunks_before) for table in tables]
        return cls(
            np.concatenate([table.rows for table in tables]) if tables else np.zeros(0, _row_type("S1")),
            b"".join(table.crc32s for table in tables),
            np.concatenate([[0], *num_pieces]).cumsum(dtype=np.int64),
        )

    @classmethod
    def _from_columns(
        cls,
        names: Sequence[str],
        samples: Sequence[int],
        tokens: Sequence[int],
        sizes: Sequence[int],
        sha256: Sequence[str],
        crc32s: Sequence[str | None],
    ) -> "ShardTable":
        encoded = np.array(names, np.bytes_)
        rows = np.empty(len(names), _row_type(encoded.dtype))
        digests = np.frombuffer(bytes.fromhex("".join(sha256)), "V32")
        for field, column in zip(rows.dtype.names, (encoded, samples, tokens, sizes, digests), strict=True):
            rows[field] = column

        pieces = [crc32 or "" for crc32 in crc32s]
        chunks_before = np.cumsum([0, *(len(digits) // 8 for digits in pieces)], dtype=np.int64)
        return cls(rows, bytes.fromhex("".join(pieces)), chunks_before)

    @property
    def samples(self) -> np.ndarray:
        """The number of samples of each shard, int64."""
        return self.rows["samples"]

    @property
    def tokens(self) -> np.ndarray:
        """The number of tokens of each shard, int64."""
        return self.rows["tokens"]

    @property
    def sizes(self) -> np.ndarray:
        """The size of each shard's tar in bytes, int64."""
        return self.rows["bytes"]

    def name(self, index: int) -> str:
        """Return the name of one shard."""
        return self.rows["name"][index].decode()

    def has_unique_names(self) -> bool:
        """Return whether no two shards have the same name."""
        return len(set(self.rows["name"].tolist())) == len(self)

    def chunk_crc32(self, shard: int, chunk: int) -> int | None:
        """Return the CRC-32 that a chunk of a shard's checksums must have; None if the manifest does not say."""
        first, end = self.chunks_before[shard : shard + 2].tolist()
        at = 4 * (first + chunk)
        return None if first == end else int.from_bytes(self.crc32s[at : at + 4], "big")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        index = range(len(self))[index]
        name, samples, tokens, size, sha256 = self.rows[index].item()
        first, end = self.chunks_before[index : index + 2].tolist()
        # Every value has been checked before.
        return Shard.model_construct(
            name=name.decode(),
            samples=samples,
            tokens=tokens,
            bytes=size,
            sha256=sha256.hex(),
            crc32=self.crc32s[4 * first : 4 * end].hex() or None,
        )

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def parse_with_table(text: str) -> tuple[Any, ShardTable] | None:
    """The JSON of a manifest without its shards, and these; None where anything about the shards is not by the rules."""
    tables: list[ShardTable] = []
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [])
    name, samples, tokens, sizes, sha256, crc32 = (column.append for column in columns)

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
        # Spelled out, because it runs a million times.
        if len(pairs) == len(_FIELDS):
            (key_0, value_0), (key_1, value_1), (key_2, value_2), (key_3, value_3), (key_4, value_4), (key_5, value_5) = pairs
        elif len(pairs) == len(_FIELDS) - 1:
            (key_0, value_0), (key_1, value_1), (key_2, value_2), (key_3, value_3), (key_4, value_4) = pairs
            key_5, value_5 = _FIELDS[-1], None
        else:
            return dict(pairs)
        if (key_0, key_1, key_2, key_3, key_4, key_5) != _FIELDS:
            return dict(pairs)
        name(value_0), samples(value_1), tokens(value_2), sizes(value_3), sha256(value_4), crc32(value_5)
        if len(columns[0]) == _SHARDS_AT_ONCE:
            tabulate()
        return None

    def tabulate() -> None:
        # At once, because as objects they take five times the memory.
        if not _are_right(*columns):
            raise ValueError
        tables.append(ShardTable._from_columns(*columns))
        for column in columns:
            column.clear()

    try:
        content = json.loads(text, object_pairs_hook=take)
        if columns[0]:
            tabulate()
    except (ValueError, RecursionError):
        return None
    table = ShardTable.joined(tables)
    is_right = isinstance(content, dict) and len(table) > 0 and content.pop("shards", None) == [None] * len(table)
    return (content, table) if is_right else None


def _are_right(
    names: list[Any], samples: list[Any], tokens: list[Any], sizes: list[Any], sha256: list[Any], crc32s: list[Any]
) -> bool:
    if set(map(type, names)) != {str} or set(map(type, sha256)) != {str} or set(map(type, crc32s)) - {str, type(None)}:
        return False
    if any(set(map(type, column)) != {int} for column in (samples, tokens, sizes)):
        return False
    if min(samples) < 1 or min(tokens) < 0 or min(sizes) < 1:
        return False
    if max(samples) >= _MOST_SAMPLES or max(*tokens, *sizes) >= _MOST_BYTES:
        return False
    if any(crc32 is not None and len(crc32) != _num_digits(count) for crc32, count in zip(crc32s, samples, strict=True)):
        return False
    if set(map(len, sha256)) != {64} or not _are_hexadecimal(sha256) or not _are_hexadecimal(filter(None, crc32s)):
        return False
    return all(map(re.compile(NAME).fullmatch, names))


def _are_hexadecimal(strings: Iterable[str]) -> bool:
    # What a pattern would say of them one by one, in a tenth of the time.
    return not "".join(strings).encode().translate(None, b"0123456789abcdef")


def _row_type(name_type: Any) -> np.dtype:
    return np.dtype([("name", name_type), ("samples", "i8"), ("tokens", "i8"), ("bytes", "i8"), ("sha256", "V32")])


def _values(shard: Shard) -> tuple[Any, ...]:
    return tuple(getattr(shard, field) for field in _FIELDS)
