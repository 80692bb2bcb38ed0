"""Reading documents from files, and counting those that cannot be used.

    .txt                             a document is the whole file
    .jsonl, .jsonl.gz, .jsonl.zst    a line's text field
    .parquet, hf: folder             a row's text column
    .tar (webdataset)                a key's member KEY.txt, or without it the text field of KEY.json (`tar_texts`)

Nothing is dropped silently. Documents are counted, and the first few are named, if they are empty (only white space),
undecodable (not UTF-8, not JSON, no text in the field) or oversized (longer than a limit, which also bounds the memory of a
decompression bomb). Undecodable documents can be made an error instead. Problems of a file are always an error: a damaged
file, one that is something else than its suffix says, or one whose first line has no such field, because then the name of the
field is probably wrong.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from pipeline.data.corpus.columns import dataset_values, parquet_values
from pipeline.data.corpus.counts import MAX_NOTES, Counts, Lines, Note
from pipeline.data.corpus.decoding import (
    MissingFieldError,
    UndecodableError,
    damaged,
    decode,
    decode_lines,
    something_else,
    text_of_line,
    text_of_value,
)
from pipeline.data.corpus.inputs import DATASET, Span
from pipeline.data.corpus.lines import lines_of
from pipeline.data.corpus.tar_texts import text_members
from pipeline.data.errors import DataError
from pipeline.data.shards.tars import Member, read_member

# The tokenizers library needs about 120 bytes of memory for each byte of a text: 2 GB for the longest document.
MAX_DOCUMENT_BYTES = 16 << 20
ON_UNDECODABLE = ("skip", "error")
_HEAD = 512


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


@dataclass(frozen=True)
class _Record:
    """A document that is not decoded yet.

    where: notes where it is, for messages. text: decodes it, given the text field, or raises UndecodableError; None if it is
    oversized.
    """

    position: int
    where: Callable[[], Note]
    text: Callable[[str], str] | None


class DocumentReader:
    """Reader of the documents of spans. It updates `counts`, and `consumed`, the bytes read so far, for progress.

    lines_before: called for an error's message, tells the lines that others have read before the first span.
    """

    def __init__(self, rules: Rules | None = None, lines_before: Callable[[], Lines | None] = lambda: None) -> None:
        self.rules = rules or Rules()
        self.counts = Counts()
        self.consumed = 0
        self._lines_before = lines_before

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
            self._note(record, f"more than {self.rules.max_document_bytes:,} bytes")
            return None

        # A missing field in the first line of a file is an error even if undecodable documents are skipped.
        try:
            text = record.text(self.rules.text_field)
        except UndecodableError as error:
            if self.rules.on_undecodable == "error":
                place = self._place_in_error(record)
                raise DataError(f"{place}: {error}; mend it, or leave it out with --on-undecodable skip") from None
            if record.position == 0 and isinstance(error, MissingFieldError):
                raise DataError(f"{self._place_in_error(record)}: {error}") from None
            self.counts.undecodable += 1
            self._note(record, str(error))
            return None

        if not text or text.isspace():
            self.counts.empty += 1
            return None
        self.counts.documents += 1
        return text

    def _note(self, record: _Record, reason: str) -> None:
        if len(self.counts.left_out) < MAX_NOTES:
            self.counts.note(replace(record.where(), reason=reason))

    def _place_in_error(self, record: _Record) -> str:
        return record.where().after(self.counts.lines).after(self._lines_before()).place

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
        if (error := something_else(span.path, data[:_HEAD], is_text=True)) is not None:
            raise error
        load = None if len(data) > self.rules.max_document_bytes else (lambda _: decode_lines(data))
        yield _Record(0, lambda: Note(span.path), load)

    def _json_lines(self, span: Span) -> Iterator[_Record]:
        before, number = self.consumed, 0
        earlier = replace(self.counts, left_out=[*self.counts.left_out])
        is_begin = span.start == 0
        with open(span.path, "rb", buffering=0 if span.kind == ".jsonl" else -1) as file:
            for number, (position, line) in enumerate(lines_of(file, span, self.rules.max_document_bytes), start=1):
                self.consumed = before + max(0, min(file.tell() - span.start, span.size))
                if line is not None and not line.strip():
                    continue
                if is_begin and (error := something_else(span.path, (line or b"")[:_HEAD], is_json=True)) is not None:
                    raise error
                is_begin = False

                def where(position: int = position, number: int = number) -> Note:
                    return Note(span.path, "", span.file, position, number, span.start)

                load = None if line is None else (lambda field, line=line: text_of_line(line, field))
                yield _Record(position, where, load)
        self._sum_up(span, number, earlier)

    def _sum_up(self, span: Span, num_lines: int, earlier: Counts) -> None:
        """Count the lines of a span, and make one note of many lines of no use if there are no others."""
        counts, noted = self.counts, len(earlier.left_out)
        num_bad = counts.undecodable - earlier.undecodable
        num_others = counts.documents + counts.empty + counts.oversized - earlier.documents - earlier.empty - earlier.oversized
        if noted < MAX_NOTES < num_bad and not num_others:
            counts.left_out[noted:] = [replace(counts.left_out[noted], lines=num_bad)]
        if span.kind == ".jsonl":
            counts.add_lines(Lines(span.file, span.start, span.end, num_lines))

    def _rows(self, span: Span) -> Iterator[_Record]:
        read = dataset_values if span.kind == DATASET else parquet_values
        limit = self.rules.max_document_bytes
        for row, value in read(span.path, self.rules.text_field, span.start, span.end, limit):
            load = None if value is ... else (lambda _, value=value: text_of_value(value))
            yield _Record(row, lambda row=row: Note(f"{span.path}, row {row}"), load)  # type: ignore[misc]

    def _tar(self, span: Span) -> Iterator[_Record]:
        def note(member: Member) -> Note:
            return Note(f"{span.path}, member {member.name}")

        def leave_out(member: Member, reason: str) -> None:
            self.counts.ignored += 1
            self.counts.note(replace(note(member), reason=reason))

        before = self.consumed
        with open(span.path, "rb", buffering=0) as file:
            try:
                texts = text_members(Path(span.path), file, leave_out)
            except DataError as error:
                raise damaged(span.path, error, "{error}") from None
            for member, suffix in texts:
                self.consumed = before + member.header
                load = self._tar_text(file, member, suffix)
                yield _Record(member.header, lambda member=member: note(member), load)  # type: ignore[misc]

    def _tar_text(self, file: BinaryIO, member: Member, suffix: str) -> Callable[[str], str] | None:
        if member.size > self.rules.max_document_bytes:
            return None
        data = read_member(file, member)
        return (lambda _: decode(data)) if suffix == "txt" else (lambda field: text_of_line(data, field))
