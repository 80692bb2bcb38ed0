"""Reading documents from files, and counting those that cannot be used.

    .txt                             a document is the whole file
    .jsonl, .jsonl.gz, .jsonl.zst    a line's text field
    .parquet, hf: folder             a row's text column
    .tar (webdataset)                a key's member KEY.txt, or without it the text field of KEY.json

Nothing is dropped silently. Documents are counted, and the first few are named, if they are empty (only white space),
undecodable (not UTF-8, not JSON, no text in the field) or oversized (longer than a limit, which also bounds the memory of a
decompression bomb). Undecodable documents can be made an error instead. Problems of a file are always an error: a damaged
file, or one whose first line has no such field, because then the name of the field is probably wrong.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.corpus.columns import dataset_values, parquet_values
from pipeline.data.corpus.inputs import DATASET, Span
from pipeline.data.corpus.lines import line_name, lines_of
from pipeline.data.errors import DataError
from pipeline.data.shards.tars import members, read_member

# The tokenizers library needs about 120 bytes of memory for each byte of a text: 2 GB for the longest document.
MAX_DOCUMENT_BYTES = 16 << 20
ON_UNDECODABLE = ("skip", "error")
_MAX_NOTES = 5
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """A text and the name of its source ("" where the inputs have no names).

    `file` and `position` identify the document: the number of its file, and its byte, line or row in the file.
    """

    text: str
    source: str
    file: int = field(default=0, compare=False)
    position: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Rules:
    """Rules of reading documents.

    text_field: the field or column with the text.
    max_document_bytes: longer documents are left out.
    on_undecodable: "skip" or "error".
    """

    text_field: str = "text"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    on_undecodable: str = "error"


@dataclass
class Counts:
    """Counts of documents, used and left out. `ignored` counts tar members that are neither text nor JSON; `notes` describe the
    first few that were left out.

    Of the documents used, `special_text` had the string of a special token, which was encoded as text, and `without_token`
    characters for which the tokenizer has no token; `warnings` describe the first few of the latter.
    """

    documents: int = 0
    empty: int = 0
    undecodable: int = 0
    oversized: int = 0
    ignored: int = 0
    special_text: int = 0
    without_token: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Add the counts of another slice of the input."""
        for name in ("documents", "empty", "undecodable", "oversized", "ignored", "special_text", "without_token"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes = (self.notes + other.notes)[:_MAX_NOTES]
        self.warnings = (self.warnings + other.warnings)[:_MAX_NOTES]

    def note(self, text: str) -> None:
        """Keep a note about something that was left out, up to `_MAX_NOTES`."""
        if len(self.notes) < _MAX_NOTES:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Keep a warning about a document that is used, up to `_MAX_NOTES`."""
        if len(self.warnings) < _MAX_NOTES:
            self.warnings.append(text)


@dataclass(frozen=True)
class _Record:
    """A document that is not decoded yet.

    where: names it for messages. text: decodes it, given the text field, or raises _UndecodableError; None if it is oversized.
    """

    position: int
    where: Callable[[], str]
    text: Callable[[str], str] | None


class DocumentReader:
    """Reader of the documents of spans. It updates `counts`, and `consumed`, the bytes read so far, for progress."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.counts = Counts()
        self.consumed = 0

    def read(self, spans: Iterable[Span]) -> Iterator[Document]:
        """Yield the documents in order.

        Raises:
            DataError: a file is damaged, a field is missing, or (if the rules say so) a document is undecodable.
        """
        for span in spans:
            before = self.consumed
            try:
                for record in self._records(span):
                    text = self._decode(record)
                    if text is not None:
                        yield Document(text, span.source, span.file, record.position)
            except OSError as error:
                raise DataError(f"cannot read {span.path}: {error.strerror or error}") from None
            self.consumed = before + span.size

    def _decode(self, record: _Record) -> str | None:
        """Decode and count a document; None if it is left out."""
        if record.text is None:
            self.counts.oversized += 1
            self.counts.note(f"{record.where()}: more than {self.rules.max_document_bytes:,} bytes")
            return None

        # A missing field in the first line of a file is an error even if undecodable documents are skipped.
        try:
            text = record.text(self.rules.text_field)
        except _UndecodableError as error:
            if self.rules.on_undecodable == "error":
                raise DataError(f"{record.where()}: {error}; mend it, or leave it out with --on-undecodable skip") from None
            if record.position == 0 and isinstance(error, _MissingFieldError):
                raise DataError(f"{record.where()}: {error}") from None
            self.counts.undecodable += 1
            self.counts.note(f"{record.where()}: {error}")
            return None

        if not text or text.isspace():
            self.counts.empty += 1
            return None
        self.counts.documents += 1
        return text

    def _records(self, span: Span) -> Iterator[_Record]:
        if span.kind == ".txt":
            return self._text_file(span)
        if span.kind == ".tar":
            return self._tar(span)
        if span.kind in (".parquet", DATASET):
            return self._rows(span)
        return self._json_lines(span)

    def _text_file(self, span: Span) -> Iterator[_Record]:
        with open(span.path, "rb") as file:
            data = file.read(self.rules.max_document_bytes + 1)
        load = None if len(data) > self.rules.max_document_bytes else (lambda _: _decode_lines(data))
        yield _Record(0, lambda: span.path, load)

    def _json_lines(self, span: Span) -> Iterator[_Record]:
        before = self.consumed
        with open(span.path, "rb") as file:
            lines = lines_of(file, span, self.rules.max_document_bytes)
            for number, (position, line) in enumerate(lines, start=1):
                self.consumed = before + min(file.tell() - span.start, span.size)
                where = line_name(span, number)
                if line is None:
                    yield _Record(position, where, None)
                elif line.strip():
                    yield _Record(position, where, lambda field, line=line: _text_of_line(line, field))  # type: ignore[misc]

    def _rows(self, span: Span) -> Iterator[_Record]:
        read = dataset_values if span.kind == DATASET else parquet_values
        limit = self.rules.max_document_bytes
        for row, value in read(span.path, self.rules.text_field, span.start, span.end, limit):
            load = None if value is ... else (lambda _, value=value: _text_of_value(value))
            yield _Record(row, lambda row=row: f"{span.path}, row {row}", load)  # type: ignore[misc]

    def _tar(self, span: Span) -> Iterator[_Record]:
        # Members of one key follow each other. The record of a key is yielded when the next key begins.
        before = self.consumed
        key: tuple[str, str] | None = None
        pending: _Record | None = None
        with open(span.path, "rb") as file:
            for member in members(Path(span.path)):
                self.consumed = before + member.header
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if (folder, stem) != key:
                    yield from [pending] if pending else []
                    key, pending = (folder, stem), None
                if member.is_folder:
                    continue

                # Of the members of a key, .txt has precedence over .json.
                if not member.is_file or extension not in ("txt", "json"):
                    self.counts.ignored += 1
                    self.counts.note(f"{span.path}, member {member.name}: neither .txt nor .json")
                elif extension == "txt" or pending is None:
                    pending = self._tar_record(span, file, member, extension)
            yield from [pending] if pending else []

    def _tar_record(self, span: Span, file: BinaryIO, member: Any, extension: str) -> _Record:
        def where() -> str:
            return f"{span.path}, member {member.name}"

        if member.size > self.rules.max_document_bytes:
            return _Record(member.header, where, None)
        data = read_member(file, member)
        load = (lambda _: _decode(data)) if extension == "txt" else (lambda field: _text_of_line(data, field))
        return _Record(member.header, where, load)


class _UndecodableError(Exception):
    pass


class _MissingFieldError(_UndecodableError):
    pass


def _decode(data: bytes) -> str:
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _UndecodableError(f"byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason})") from None


def _decode_lines(data: bytes) -> str:
    try:
        return _decode(data)
    except _UndecodableError as error:
        start = error.__context__.start  # type: ignore[union-attr]
        raise _UndecodableError(f"line {1 + data.count(bytes([10]), 0, start)}: {error}") from None


def _text_of_line(line: bytes, text_field: str) -> str:
    record = _json_object(line)
    if text_field not in record:
        fields = ", ".join(map(repr, list(record)[:8])) or "none"
        raise _MissingFieldError(f"no field {text_field!r}; its fields are {fields}; name the right one with --text-field")
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise _UndecodableError(f"expected text in field {text_field!r}, got {type(text).__name__}")
    return _without_surrogates(text or "")


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decode(line))
    except (ValueError, RecursionError) as error:
        raise _UndecodableError(f"expected one JSON object a line: {error}") from None
    if not isinstance(record, dict):
        raise _UndecodableError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _text_of_value(value: Any) -> str:
    if isinstance(value, DataError):
        raise _UndecodableError(str(value))
    if isinstance(value, bytes):
        return _decode(value)
    if value is not None and not isinstance(value, str):
        raise _UndecodableError(f"expected text, got {type(value).__name__}")
    return _without_surrogates(value or "")


def _without_surrogates(text: str) -> str:
    # JSON can encode half a surrogate pair (\ud800), which is not a character and which no tokenizer accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _UndecodableError(f"character {error.start} of the text is half a surrogate pair") from None
    return text
