"""One number for all that an input holds, by which a finished output is known to be that of its input.

It is the sum, over all documents, of a hash of the document's file, place and text, so it does not depend on how the input was
cut into slices, and workers add up their own. Names and sizes of files say nothing of an edit that keeps them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from pipeline.data.corpus.documents import Document, DocumentReader, Rules
from pipeline.data.corpus.inputs import Span
from pipeline.data.corpus.workers import Report

_BYTES = 16


class Contents:
    """The sum over the documents that pass through `of`."""

    def __init__(self) -> None:
        self.total = 0

    def of(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass documents on, and add them."""
        for document in documents:
            digest = hashlib.blake2b(f"{document.file} {document.position} ".encode(), digest_size=_BYTES)
            digest.update(document.text.encode("utf-8", "surrogatepass"))
            self.total += int.from_bytes(digest.digest(), "big")
            yield document

    def __str__(self) -> str:
        return f"{self.total % 2 ** (8 * _BYTES):0{2 * _BYTES}x}"


def added(contents: Iterable[str]) -> str:
    """The contents of several slices together."""
    total = Contents()
    total.total = sum(int(each, 16) for each in contents)
    return str(total)


def contents_of_slice(work: tuple[Rules, Sequence[Span]], report: Report) -> str:
    """Read a slice of the input for its contents alone."""
    rules, spans = work
    reader, contents, consumed = DocumentReader(rules), Contents(), 0
    for _ in contents.of(reader.read(spans)):
        report(1, 0, reader.consumed - consumed)
        consumed = reader.consumed
    report(0, 0, sum(span.size for span in spans) - consumed)
    return str(contents)
