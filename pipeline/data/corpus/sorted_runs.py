"""Runs: tokenised documents on disk, each run sorted by the shuffle's key, so that a shuffle needs no memory.

A document's key is a hash of the seed and of where the document came from (`permutation.sort_keys`); the shuffled order is
the order of the keys. Because every run is sorted by key, the documents of any stretch of the shuffled order lie together in
every run, and whoever wants a stretch reads one contiguous piece of each: an external merge sort whose last pass can begin
anywhere. Memory is that of a stretch, whatever the size of the corpus, and so are many workers at once.

How many tokens lie before a key is known by `NUM_BUCKETS` ranges of keys (their upper 16 bits), 8 bytes each.

`NAME.tokens` holds the ids; `NAME.documents` three arrays after each other, keys (uint64 [n]), ends (uint64 [n]: the tokens up
to and with this document's) and sources (uint8 [n]).
"""

from pathlib import Path

import numpy as np

from pipeline.data.corpus.packing import TokenizedDocuments
from pipeline.storage.whole_file import write_file

NUM_BUCKETS = 1 << 16
# 64 or 128 MB: what a worker holds before it writes a run.
TOKENS_PER_RUN = 1 << 25

_BYTES_PER_DOCUMENT = 8 + 8 + 1


class RunWriter:
    """Collects documents and writes them as the runs `NAME-000`, `NAME-001`, … in `directory`."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, tokens_per_run: int = TOKENS_PER_RUN) -> None:
        self.directory = Path(directory)
        self.name = name
        self.dtype = dtype
        self.tokens_per_run = tokens_per_run
        self.num_documents = self.num_tokens = 0
        self._num_runs = self._held_tokens = 0
        self._documents: list[tuple[np.ndarray, int]] = []
        self._keys: list[int] = []

    def add(self, key: int, ids: np.ndarray, source: int) -> None:
        """Take a document: its key, its ids [n], n >= 1, and the index of its source."""
        self._keys.append(key)
        self._documents.append((ids, source))
        self._held_tokens += len(ids)
        self.num_documents += 1
        self.num_tokens += len(ids)
        if self._held_tokens >= self.tokens_per_run:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._documents:
            self._write()

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        keys = np.array(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        documents = TokenizedDocuments.join([self._documents[index] for index in order.tolist()])
        ends = documents.starts + documents.lengths
        name = f"{self.name}-{self._num_runs:03d}"
        write_file(self.directory / f"{name}.tokens", documents.tokens.astype(self.dtype, copy=False).tobytes())
        index = [keys[order].astype("<u8").tobytes(), ends.astype("<u8").tobytes(), documents.sources.tobytes()]
        write_file(self.directory / f"{name}.documents", b"".join(index))
        self._num_runs += 1
        self._held_tokens = 0
        self._documents, self._keys = [], []


class Runs:
    """The runs in some folder, read as one shuffled sequence of documents."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.paths = sorted(Path(directory).glob("*.documents"))

    def tokens_before_bucket(self) -> np.ndarray:
        """How many tokens the shuffled order has before each bucket, and in all: int64 [NUM_BUCKETS + 1]."""
        totals = np.zeros(NUM_BUCKETS, np.int64)
        for path in self.paths:
            keys, ends, _ = _open_index(path)
            last = np.searchsorted(keys, _bucket_edges()[1:])
            totals += np.diff(np.concatenate([[0], ends])[np.concatenate([[0], last, [len(keys)]])].astype(np.int64))
        return np.concatenate([[0], np.cumsum(totals)])

    def documents_in_buckets(self, first: int, last: int) -> TokenizedDocuments:
        """The documents of buckets `first` to `last`, the latter not included, in their shuffled order."""
        pieces = [piece for path in self.paths if (piece := self._read(path, first, last)) is not None]
        keys = np.concatenate([piece[0] for piece in pieces])
        shift = np.cumsum([0, *(len(piece[1].tokens) for piece in pieces[:-1])])
        documents = TokenizedDocuments(
            tokens=np.concatenate([piece[1].tokens for piece in pieces]),
            starts=np.concatenate([piece[1].starts + before for piece, before in zip(pieces, shift, strict=True)]),
            lengths=np.concatenate([piece[1].lengths for piece in pieces]),
            sources=np.concatenate([piece[1].sources for piece in pieces]),
        )
        return documents.select(np.argsort(keys, kind="stable"))

    def _read(self, path: Path, first: int, last: int) -> tuple[np.ndarray, TokenizedDocuments] | None:
        keys, ends, sources = _open_index(path)
        low = int(np.searchsorted(keys, _bucket_edges()[first]))
        high = len(keys) if last == NUM_BUCKETS else int(np.searchsorted(keys, _bucket_edges()[last]))
        if low == high:
            return None
        before = int(ends[low - 1]) if low else 0
        relative_ends = ends[low:high].astype(np.int64) - before
        lengths = np.diff(relative_ends, prepend=0)
        tokens = np.fromfile(
            path.with_suffix(".tokens"), self.dtype, int(relative_ends[-1]), offset=before * self.dtype.itemsize
        )
        documents = TokenizedDocuments(tokens, relative_ends - lengths, lengths, np.array(sources[low:high]))
        return np.array(keys[low:high]), documents


def _open_index(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run's keys, ends and sources, mapped: looking for a key reads a few pages."""
    data = np.memmap(path, np.uint8, "r")
    count = len(data) // _BYTES_PER_DOCUMENT
    return data[: 8 * count].view("<u8"), data[8 * count : 16 * count].view("<u8"), data[16 * count :]


def _bucket_edges() -> np.ndarray:
    """The first key of every bucket, uint64 [NUM_BUCKETS]."""
    return np.arange(NUM_BUCKETS, dtype=np.uint64) << np.uint64(64 - 16)
