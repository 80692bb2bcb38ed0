"""External scores, a number a token of the user's own making: rows go out to be scored, and their scores come in.

`export_rows` writes each row's key and ids. `import_scores` reads the scores made of them, in one of two forms:

    .npy    float32 [samples, T], the rows in the manifest's order
    .jsonl  a line {"key": KEY, "scores": [T numbers]} for each row, in any order

and keeps them as cached losses are kept (`reference_losses`), bound to the bytes of the data. The score of token j is that of
every pair whose target is j. Scores of padding are ignored; the number of an unscored token must be given all the same.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.shards.losses_writer import LossesWriter
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest, read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.reference_losses import STORED_DTYPES, LossesManifest, data_fingerprint
from pipeline.data.shards.sample import Sample
from pipeline.storage.files import DIRECT, Access, read_whole
from pipeline.storage.location import Location

_ROWS_AT_ONCE = 1024


def export_rows(data: Location, access: Access = DIRECT) -> Iterator[str]:
    """Yield a line of JSON for each row of a prepared folder, in the manifest's order: `key`; `tokens`, its T ids; `documents`,
    the lengths of its documents, after which the rest is padding.

    Raises:
        DataError: a row is damaged.
    """
    for sample in _samples(data, read_manifest(data, access), access):
        row = {"key": sample.key, "tokens": sample.tokens.tolist(), "documents": sample.lengths.tolist()}
        yield json.dumps(row)


def import_scores(file: Path, data: Location, cache: Path, dtype: str = "float32", access: Access = DIRECT) -> Path:
    """Check the scores of a data set's tokens and keep them in the directory `cache`; returns their folder in it.

    dtype: `float32` or `float16`, of the stored scores.

    Raises:
        DataError: scores are missing, of another shape, of no row, or not finite; or the data is damaged.
    """
    manifest = read_manifest(data, access)
    with tempfile.TemporaryDirectory() as temporary:
        samples = list(_rows_of(data, manifest, access))
        scores_ST = _read_npy(file) if file.suffix == ".npy" else _read_lines(file, samples, manifest, Path(temporary))
        _check_shape(scores_ST, manifest, file)
        sha256 = hashlib.sha256()
        for first in range(0, len(samples), _ROWS_AT_ONCE):
            sha256.update(_checked(scores_ST, samples, first, first + _ROWS_AT_ONCE, dtype, file).tobytes())
        return _keep(scores_ST, samples, manifest, sha256.hexdigest(), data, cache, dtype, file, access)


def _keep(
    scores_ST: np.ndarray,
    samples: list[tuple[str, int]],
    manifest: Manifest,
    sha256: str,
    data: Location,
    cache: Path,
    dtype: str,
    file: Path,
    access: Access,
) -> Path:
    """Write the scores as cached losses are written."""
    losses = LossesManifest.model_validate(
        {
            "data_sha256": data_fingerprint(read_whole(data / MANIFEST_FILE, access)),
            "reference_sha256": sha256,
            "reference": str(file.absolute()),
            "precision": "float32",
            "horizon": "external",
            "dtype": dtype,
            "sequence_length": manifest.sequence_length,
            "columns": 1,
        }
    )
    writer = LossesWriter(cache, losses, manifest)
    if writer.begin():
        damaged = writer.damaged()
        if damaged:
            raise DataError(f"{writer.folder}: the scores of {', '.join(damaged[:4])} are damaged; remove it and import again")
        return writer.folder

    firsts = np.cumsum([0, *(shard.samples for shard in manifest.shards)]).tolist()
    for shard, first, end in writer.missing():
        begins, ends = firsts[shard] + first, firsts[shard] + end
        writer.write((shard, first, end), _checked(scores_ST, samples, begins, ends, dtype, file)[..., None])
    for shard in range(len(manifest.shards)):
        writer.join(shard)
    writer.finish()
    return writer.folder


def _samples(data: Location, manifest: Manifest, access: Access) -> Iterator[Sample]:
    """Read all rows, in the manifest's order."""
    reader = ShardReader(data, manifest, access)
    for shard, of in enumerate(manifest.shards):
        for first in range(0, of.samples, _ROWS_AT_ONCE):
            rows = range(first, min(first + _ROWS_AT_ONCE, of.samples))
            for sample in reader.read_many([shard] * len(rows), list(rows)):
                if sample.damage is not None:
                    raise DataError(sample.damage)
                yield sample
    reader.close()


def _rows_of(data: Location, manifest: Manifest, access: Access) -> Iterator[tuple[str, int]]:
    """(key, tokens without padding) of each row."""
    for sample in _samples(data, manifest, access):
        yield sample.key, int(sample.lengths.sum())


def _read_npy(file: Path) -> np.ndarray:
    try:
        # Not np.load, which also opens archives of arrays. Objects, which would be unpickled, cannot be mapped.
        scores: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise DataError(f"{file}: expected an array saved by numpy.save ({error})") from None
    return scores


def _check_shape(scores_ST: np.ndarray, manifest: Manifest, file: Path) -> None:
    expected = (manifest.num_samples, manifest.sequence_length)
    if scores_ST.dtype != np.float32 or scores_ST.shape != expected:
        raise DataError(
            f"{file}: expected float32 {list(expected)}, a row for each sample of the manifest, a number for each token; got "
            f"{scores_ST.dtype} {list(scores_ST.shape)}"
        )


def _read_lines(file: Path, samples: list[tuple[str, int]], manifest: Manifest, temporary: Path) -> np.ndarray:
    """Sort the lines' scores into the manifest's order, in a file, since they may exceed the memory."""
    numbers = {key: number for number, (key, _) in enumerate(samples)}
    shape = (manifest.num_samples, manifest.sequence_length)
    scores_ST = np.lib.format.open_memmap(temporary / "scores.npy", "w+", np.dtype("<f4"), shape)
    is_given = np.zeros(len(samples), bool)
    with file.open("rb") as lines:
        for place, line in enumerate(lines, 1):
            key, scores = _parsed(line, f"{file}, line {place}", manifest.sequence_length)
            number = numbers.get(key)
            if number is None:
                raise DataError(f"{file}, line {place}: the data has no row '{key}'; see launch/shards.py export-rows")
            if is_given[number]:
                raise DataError(f"{file}, line {place}: the row '{key}' was there before; expected each row once")
            is_given[number] = True
            with np.errstate(over="ignore"):
                scores_ST[number] = scores
    if not is_given.all():
        missing = [samples[number][0] for number in np.flatnonzero(~is_given)[:4].tolist()]
        raise DataError(
            f"{file}: no scores of {int((~is_given).sum()):,} of the {len(samples):,} rows, the first of them "
            f"{', '.join(missing)}"
        )
    return scores_ST


def _parsed(line: bytes, place: str, sequence_length: int) -> tuple[str, np.ndarray]:
    """The key and the scores of a line, float64 [T], NaN for null."""
    try:
        value: Any = json.loads(line)
        key, scores = value["key"], value["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f'{place}: expected {{"key": …, "scores": […]}}, got {line[:60]!r}') from None
    are_numbers = isinstance(scores, list) and all(
        each is None or (isinstance(each, int | float) and not isinstance(each, bool)) for each in scores
    )
    if not are_numbers or len(scores) != sequence_length:
        got = f"{len(scores)} entries" if isinstance(scores, list) else type(scores).__name__
        raise DataError(f"{place}: expected {sequence_length} numbers as scores, one a token of the row, got {got}")
    try:
        return str(key), np.array(scores, np.float64)
    except OverflowError:
        raise DataError(f"{place}: expected numbers that a float32 holds, got an integer of hundreds of digits") from None


def _checked(scores_ST: np.ndarray, samples: list[tuple[str, int]], first: int, end: int, dtype: str, file: Path) -> np.ndarray:
    """The scores of some rows, float32 [rows, T], 0 at padding; all of them finite as they will be stored."""
    lengths_S = np.array([length for _, length in samples[first:end]])
    is_token_ST = np.arange(scores_ST.shape[1]) < lengths_S[:, None]
    found_ST = np.where(is_token_ST, scores_ST[first:end], np.float32(0))
    with np.errstate(over="ignore"):
        bad = np.argwhere(~np.isfinite(found_ST.astype(STORED_DTYPES[dtype])))
    if len(bad):
        row, token = bad[0].tolist()
        score = found_ST[row, token]
        kind = f"is too large for {dtype} (--dtype float32 holds it)" if np.isfinite(score) else "is not finite"
        raise DataError(
            f"{file}: a score that {kind} of sample {samples[first + row][0]}, token {token}: {score}; nothing was imported"
        )
    return found_ST
