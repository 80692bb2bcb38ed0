"""The shards of a manifest, as columns: a data set of twenty trillion tokens has a million of them.

A million records validated one by one take half a minute and two gigabytes. Here the JSON's objects become columns while
they are parsed, and the rules are applied to a whole column at a time. What is not as it should be is left to pydantic,
record by record, so that the rules and their messages have one owner.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

# Names become file names: a manifest from elsewhere must not be able to point outside its folder.
NAME, SHA256 = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", r"[0-9a-f]{64}"
FileName = Annotated[str, Field(pattern=f"^{NAME}$")]
# Below these bounds sums over a million shards, and products with the sizes of items, stay within int64.
_MOST_SAMPLES, _MOST_BYTES = 2**32, 2**42
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=_MOST_SAMPLES)]
OfShard = Annotated[int, Field(ge=0, lt=_MOST_BYTES)]
Sha256 = Annotated[str, Field(pattern=f"^{SHA256}$")]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(Record):
    """One tar, `NAME.tar`, of `bytes` bytes; `tokens` are without padding. `crc32` is the CRC-32 of `NAME.tar.crc32`, which
    ties the checksums, and by them the samples, to this manifest; folders made before it was thought of have none."""

    name: FileName
    samples: Positive
    tokens: OfShard
    bytes: Annotated[OfShard, Field(ge=1)]
    sha256: Sha256
    crc32: Crc32 | None = None


_FIELDS = tuple(Shard.model_fields)
_NO_CRC = -1


class _Names(Sequence[str]):
    """Strings in one string: a million of their own would be three times as much memory, and work for every garbage
    collection."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self._text = "".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._text[self._ends[index] : self._ends[index + 1]]

    def __iter__(self) -> Iterator[str]:
        return (self._text[start:end] for start, end in itertools.pairwise(self._ends.tolist()))


@dataclass(frozen=True, eq=False)
class ShardTable(Sequence[Shard]):
    """Shards in the manifest's order: names, then int64 samples, tokens and sizes in bytes, then the sha256 of all, 32 bytes
    each, and int64 CRC-32s of their checksums, negative where there is none."""

    names: Sequence[str]
    samples: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray
    digests: bytes
    crc32s: np.ndarray

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "ShardTable":
        """The table of these shards."""
        if isinstance(shards, ShardTable):
            return shards
        return (
            cls._from_columns(*zip(*map(_values, shards), strict=True)) if shards else cls._from_columns(*[()] * len(_FIELDS))
        )

    @classmethod
    def joined(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """The shards of all these tables, one after the other."""
        return cls(
            _Names(name for table in tables for name in table.names),
            np.concatenate([table.samples for table in tables]),
            np.concatenate([table.tokens for table in tables]),
            np.concatenate([table.sizes for table in tables]),
            b"".join(table.digests for table in tables),
            np.concatenate([table.crc32s for table in tables]),
        )

    @classmethod
    def _from_columns(
        cls,
        names: Sequence[str],
        samples: Sequence[int],
        tokens: Sequence[int],
        sizes: Sequence[int],
        sha256: Sequence[str],
        crc32s: Sequence[int | None],
    ) -> "ShardTable":
        known = [_NO_CRC if crc32 is None else crc32 for crc32 in crc32s]
        columns = [np.array(column, np.int64) for column in (samples, tokens, sizes, known)]
        return cls(_Names(names), columns[0], columns[1], columns[2], bytes.fromhex("".join(sha256)), columns[3])

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        index = range(len(self))[index]
        # Every value has been checked before.
        return Shard.model_construct(
            name=self.names[index],
            samples=int(self.samples[index]),
            tokens=int(self.tokens[index]),
            bytes=int(self.sizes[index]),
            sha256=self.digests[32 * index : 32 * index + 32].hex(),
            crc32=None if self.crc32s[index] == _NO_CRC else int(self.crc32s[index]),
        )

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def parse_with_table(text: str) -> tuple[Any, ShardTable] | None:
    """The JSON of a manifest without its shards, and these; None where anything about the shards is not by the rules."""
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
        return None

    try:
        content = json.loads(text, object_pairs_hook=take)
        if not isinstance(content, dict) or content.pop("shards", None) != [None] * len(columns[0]) or not _are_right(*columns):
            return None
        return content, ShardTable._from_columns(*columns)
    except (ValueError, RecursionError):
        return None


def _are_right(
    names: list[Any], samples: list[Any], tokens: list[Any], sizes: list[Any], sha256: list[Any], crc32s: list[Any]
) -> bool:
    if not names:
        return False
    if set(map(type, names)) != {str} or set(map(type, sha256)) != {str}:
        return False
    known = [crc32 for crc32 in crc32s if crc32 is not None]
    if any(set(map(type, column)) - {int} for column in (samples, tokens, sizes, known)):
        return False
    if min(samples) < 1 or min(tokens) < 0 or min(sizes) < 1 or min(known, default=0) < 0:
        return False
    if max(samples) >= _MOST_SAMPLES or max(*tokens, *sizes) >= _MOST_BYTES or max(known, default=0) >= 2**32:
        return False
    name, digest = re.compile(NAME), re.compile(SHA256)
    return all(map(name.fullmatch, names)) and all(map(digest.fullmatch, sha256))


def _values(shard: Shard) -> tuple[Any, ...]:
    return tuple(getattr(shard, field) for field in _FIELDS)
