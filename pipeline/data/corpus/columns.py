"""Text columns: .parquet files (with the optional `pyarrow`) and `hf:` folders (with the optional `datasets`).

A .parquet file is read row by row, to bound memory. The decoded size of rows cannot be known beforehand, as the sizes in the
footer may be wrong. Memory then holds one value and one page, usually of 1 MiB (the format allows 2 GiB). Larger batches would
save only a fiftieth of the time of tokenising short rows.

A folder written by `datasets.Dataset.save_to_disk` is read by `datasets` itself, which resolves its indices, a few hundred
rows at a time: a call costs much more, and the values are stored uncompressed. Nothing is downloaded, and no loading script
is run.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

from pipeline.data.corpus.decoding import damaged, recognised
from pipeline.data.errors import DataError

_DATASET_ROWS_AT_ONCE = 256
_PARQUET = ("corpora", "reading .parquet")


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional module.

    Raises:
        DataError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what} needs {module.partition('.')[0]}: pip install 'selective-mtp[{extra}]'") from None


def row_groups(path: str) -> list[int]:
    """List the compressed size in bytes of each row group of a .parquet file."""
    metadata = _metadata(path)
    return [_stored_bytes(metadata.row_group(group)) for group in range(metadata.num_row_groups)]


def parquet_values(path: str, field: str, first_group: int, last_group: int, limit: int) -> Iterator[tuple[int, Any]]:
    """Yield (row number, value) of column `field` in the row groups [first_group, last_group).

    A value is a str, bytes or None; a DataError if the text is not UTF-8; `...` if it has more than `limit` bytes.

    Raises:
        DataError: the file is damaged, or has no such text column.
    """
    file = _open_parquet(path, _metadata(path))
    pyarrow, compute = require("pyarrow", *_PARQUET), require("pyarrow.compute", *_PARQUET)
    _check_field(file.schema_arrow.names, field, path)

    # One row at a time, numbered over the whole file.
    row = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
    groups = list(range(first_group, last_group))
    batches = file.iter_batches(1, row_groups=groups, columns=[field], use_threads=False)
    try:
        for batch in batches:
            column = _decoded(batch.column(0), field, path)
            for value, size in zip(column, compute.binary_length(column).to_pylist(), strict=True):
                yield row, ... if size is not None and size > limit else _value(value)
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged(path, error) from None


def dataset_files(folder: str) -> list[str]:
    """List the files of a folder that `datasets` saved.

    Raises:
        DataError: it is not such a folder.
    """
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        raise DataError(f"hf:{folder} holds several splits: name one of them, hf:{folder}/{{{','.join(splits)}}}")
    if not os.path.isfile(os.path.join(folder, "state.json")):
        raise DataError(
            f"expected a folder written by datasets' save_to_disk at {folder!r}, but it has no state.json; "
            "other files are read without the prefix hf:"
        )
    return sorted(entry.path for entry in os.scandir(folder) if entry.is_file())


def dataset_rows(folder: str) -> int:
    """Count the rows of a `hf:` folder."""
    return len(_open_dataset(folder))


def dataset_values(folder: str, field: str, first: int, last: int, limit: int) -> Iterator[tuple[int, Any]]:
    """Yield (row number, value) of column `field` in the rows [first, last); values and errors as `parquet_values`."""
    dataset = _open_dataset(folder)
    _check_field(dataset.column_names, field, f"hf:{folder}")
    kind = getattr(dataset.features[field], "dtype", "a list")
    if kind.removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
        raise _not_text(f"hf:{folder}", field, kind)
    dataset = dataset.select_columns([field])
    for start in range(first, last, _DATASET_ROWS_AT_ONCE):
        for row, value in enumerate(_read_rows(dataset, folder, field, start, min(start + _DATASET_ROWS_AT_ONCE, last)), start):
            if isinstance(value, str | bytes):
                size = len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else len(value)
                yield row, ... if size > limit else value
            else:
                yield row, value


def _read_rows(dataset: Any, folder: str, field: str, start: int, end: int) -> list[Any]:
    try:
        return list(dataset[start:end][field])
    except UnicodeDecodeError as error:
        # Row by row, to find the one.
        if end - start == 1:
            return [_not_utf8(error)]
        return [value for row in range(start, end) for value in _read_rows(dataset, folder, field, row, row + 1)]
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"hf:{folder} is damaged in the rows {start} to {end - 1}: {error}; copy it again") from None


def _open_parquet(path: str, metadata: Any = None) -> Any:
    parquet = require("pyarrow.parquet", *_PARQUET)
    try:
        return parquet.ParquetFile(path, metadata=metadata)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise damaged(path, error, "{path} is not a parquet file that can be read: {error}") from None


def _metadata(path: str) -> Any:
    stat = os.stat(path)
    return _metadata_of(path, stat.st_size, stat.st_mtime_ns)


# The footer of a file with many row groups is large, and every span would read it again.
@lru_cache(maxsize=16)
def _metadata_of(path: str, size: int, changed: int) -> Any:
    return _open_parquet(path).metadata


@lru_cache(maxsize=4)
def _open_dataset(folder: str) -> Any:
    datasets = require("datasets", "datasets", "reading hf: folders")
    try:
        # A format that was saved with it, such as torch or pandas, would change the values and hide columns.
        return datasets.load_from_disk(folder).with_format(None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found = (recognised(path, is_json=path.endswith(".json")) for path in dataset_files(folder))
        message = f"hf:{folder} cannot be read by datasets: {error}; copy it again"
        raise next(filter(None, found), DataError(message)) from None


def _stored_bytes(group: Any) -> int:
    return max(1, sum(group.column(column).total_compressed_size for column in range(group.num_columns)))


def _check_field(names: Sequence[str], field: str, where: str) -> None:
    if field not in names:
        fields = ", ".join(map(repr, list(names)[:8])) or "none"
        raise DataError(f"{where}: no column {field!r}; its columns are {fields}; name the right one with --text-field")


def _decoded(column: Any, field: str, path: str) -> Any:
    """Check that a column is text or bytes, or all null, and give it a type with the lengths of its values."""
    pyarrow = require("pyarrow", *_PARQUET)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) in ("null", "string_view"):
        return column.cast(pyarrow.large_string())
    if str(column.type) == "binary_view":
        return column.cast(pyarrow.large_binary())
    kinds = ("is_string", "is_large_string", "is_binary", "is_large_binary")
    if not any(getattr(pyarrow.types, kind)(column.type) for kind in kinds):
        raise _not_text(path, field, column.type)
    return column


def _not_text(where: str, field: str, kind: object) -> DataError:
    return DataError(f"{where}: expected text in column {field!r}, got {kind}; name the right one with --text-field")


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> DataError:
    return DataError(f"byte {error.start} of the text is not UTF-8 ({error.reason})")
