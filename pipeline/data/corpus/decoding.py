"""Decoding: from bytes to the text of a document, and files that are something else than their suffix says."""

import json
from typing import Any

from pipeline.data.errors import DataError
from pipeline.storage.lfs_pointer import pointer_problem

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD = 512
# First bytes of other kinds of file, and the suffix that such a file should have.
_OTHER_KINDS = {
    b"\x1f\x8b": ("compressed by gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstandard", ".zst"),
    b"PAR1": ("a parquet file", ".parquet"),
    b"PK\x03\x04": ("a zip archive", ".zip"),
    b"\xff\xfe": ("text in UTF-16", ".utf16"),
    b"\xfe\xff": ("text in UTF-16", ".utf16"),
}


class UndecodableError(Exception):
    """A document has no text that can be read; the message says why."""


class MissingFieldError(UndecodableError):
    """A JSON object has no such field."""


def decode(data: bytes) -> str:
    """Decode UTF-8; errors as all functions here: UndecodableError."""
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableError(_not_utf_8(error)) from None


def decode_lines(data: bytes) -> str:
    """Decode UTF-8; an error names the line."""
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableError(f"line {1 + error.object.count(10, 0, error.start)}: {_not_utf_8(error)}") from None


def _not_utf_8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason})"


def text_of_line(line: bytes, text_field: str) -> str:
    """Take the text field of a JSON object; "" for null.

    Raises:
        MissingFieldError: it has no such field.
    """
    record = _json_object(line)
    if text_field not in record:
        fields = ", ".join(map(repr, list(record)[:8])) or "none"
        raise MissingFieldError(f"no field {text_field!r}; its fields are {fields}; name the right one with --text-field")
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise UndecodableError(f"expected text in field {text_field!r}, got {type(text).__name__}")
    return _without_surrogates(text or "")


def text_of_value(value: Any) -> str:
    """Take the text of a value of a column; "" for null."""
    if isinstance(value, DataError):
        raise UndecodableError(str(value))
    if isinstance(value, bytes):
        return decode(value)
    if value is not None and not isinstance(value, str):
        raise UndecodableError(f"expected text, got {type(value).__name__}")
    return _without_surrogates(value or "")


def something_else(path: str, head: bytes, *, is_text: bool = False, is_json: bool = False) -> DataError | None:
    """Recognise a file, by its first bytes, that as a whole is not what its suffix says; returns the error to raise.

    Args:
        path: names the file.
        head: its first bytes, or those of its content.
        is_text: true for a .txt, which may hold a page of HTML; it has other bytes than text at the cost of one document only.
        is_json: true where JSON is expected.
    """
    head = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if (problem := pointer_problem(path, head)) is not None:
        return DataError(problem)
    if is_text:
        return None
    if head.startswith(b"<"):
        return DataError(
            f"{path} is a page of HTML or XML, such as a server's error, and not what its suffix says; download it again"
        )

    # Perhaps all is well but the name.
    kinds = [
        what for start, (what, suffix) in _OTHER_KINDS.items() if head.startswith(start) and not path.lower().endswith(suffix)
    ]
    if head.startswith(b"{") and not is_json:
        kinds.append("plain JSON")
    if kinds:
        return DataError(f"{path} is {kinds[0]}, and not what its suffix says; convert it or give it its right name")
    return None


def recognised(path: str, *, is_json: bool = False) -> DataError | None:
    """Recognise a file that cannot be read as what its suffix says, by its first bytes; None if it may be that, and damaged."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEAD)
    return something_else(path, head, is_json=is_json)


def damaged(path: str, error: object, otherwise: str = "{path} is damaged: {error}; copy it again") -> DataError:
    """Make the error to raise where a file cannot be read as what its suffix says: it may be something else."""
    return recognised(path) or DataError(otherwise.format(path=path, error=error))


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(decode(line))
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"expected one JSON object a line: {error}") from None
    if not isinstance(record, dict):
        raise UndecodableError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _without_surrogates(text: str) -> str:
    # JSON can encode half a surrogate pair (\ud800), which is not a character and which no tokenizer accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UndecodableError(f"character {error.start} of the text is half a surrogate pair") from None
    return text
