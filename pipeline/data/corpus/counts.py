"""Counts of documents, used and left out, and notes about the first ones that were left out.

A worker that reads the middle of a file does not know the numbers of its lines, and reading all that is before it to count them
would make the cost quadratic. So a note has the number of its line among those of its span, every span says how many lines it
had, and adding the counts of neighbouring spans adds the numbers up. Where a span before it is another job's (`--part`), or is
not finished when an error ends the work, a line is named by its byte.
"""

from dataclasses import dataclass, field, replace
from typing import Any

MAX_NOTES = 5
_NUMBERS = ("documents", "empty", "undecodable", "oversized", "ignored", "special_text", "without_token")


@dataclass(frozen=True)
class Lines:
    """The number of lines that begin in the bytes [start, end) of file number `file`."""

    file: int
    start: int
    end: int
    count: int

    def are_before(self, file: int, start: int) -> bool:
        """Check if these lines end where those of a span begin."""
        return (self.file, self.end) == (file, start)


@dataclass(frozen=True)
class Note:
    """A note about a document that was left out.

    what: names its file, and the member or row in it.
    reason: why it was left out.
    file, position: the number of its file, and its byte, line or row in the file.
    line: its number, from 1, among the lines that begin at byte `lines_from` of the file or after; None if it is not a line.
    lines: more than 1 if the note is about so many lines that were left out together, from this one on.
    """

    what: str
    reason: str = ""
    file: int = 0
    position: int = 0
    line: int | None = None
    lines_from: int = 0
    lines: int = 1

    @property
    def place(self) -> str:
        """Name the document: by the number of its line where that is known, else by its byte."""
        return self.what if self.line is None else f"{self.what}, {self._line}"

    @property
    def _line(self) -> str:
        return f"the line at byte {self.position:,}" if self.lines_from else f"line {self.line}"

    def __str__(self) -> str:
        if self.lines > 1:
            return f"{self.what}: {self.lines:,} lines together cannot be used; the first, {self._line}: {self.reason}"
        return f"{self.place}: {self.reason}"

    def after(self, lines: Lines | None) -> "Note":
        """Number the line with those before its span, if these are known."""
        if self.line is None or lines is None or not lines.are_before(self.file, self.lines_from):
            return self
        return replace(self, line=self.line + lines.count, lines_from=lines.start)


@dataclass
class Counts:
    """Counts of documents, used and left out.

    ignored: members of tars that are no documents.
    special_text: documents used that had the string of a special token, which was encoded as text.
    without_token: documents used with characters for which the tokenizer has no token.
    left_out: notes about the first few documents that were left out.
    warnings: about the first few documents without a token for some character.
    lines: those of the last span of a .jsonl, together with all that were counted just before it.
    """

    documents: int = 0
    empty: int = 0
    undecodable: int = 0
    oversized: int = 0
    ignored: int = 0
    special_text: int = 0
    without_token: int = 0
    left_out: list[Note] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: Lines | None = field(default=None, compare=False)

    @property
    def notes(self) -> list[str]:
        """The notes as sentences."""
        return [str(note) for note in self.left_out]

    def add(self, other: "Counts") -> None:
        """Add the counts of the next slice of the input."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for note in other.left_out:
            self.note(note)
        self.warnings = (self.warnings + other.warnings)[:MAX_NOTES]
        if other.lines is not None:
            self.add_lines(other.lines)

    def note(self, note: Note) -> None:
        """Keep a note about something that was left out, up to `MAX_NOTES`."""
        last = self.left_out[-1] if self.left_out else None
        if last is not None and last.file == note.file and min(last.lines, note.lines) > 1:
            self.left_out[-1] = replace(last, lines=last.lines + note.lines)
        elif len(self.left_out) < MAX_NOTES:
            self.left_out.append(note.after(self.lines))

    def warn(self, text: str) -> None:
        """Keep a warning about a document that is used, up to `MAX_NOTES`."""
        if len(self.warnings) < MAX_NOTES:
            self.warnings.append(text)

    def add_lines(self, lines: Lines) -> None:
        """Count the lines of a span that was read to its end."""
        before = self.lines
        if before is not None and before.are_before(lines.file, lines.start):
            lines = replace(lines, start=before.start, count=before.count + lines.count)
        self.lines = lines

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Counts":
        """Make counts of what `asdict` makes of them."""
        notes = [Note(**note) for note in values["left_out"]]
        lines = values["lines"] and Lines(**values["lines"])
        return cls(**{**values, "left_out": notes, "lines": lines})
