"""Sorted runs: tokenised documents on disk, to shuffle a corpus of any size by an external merge sort.

A document's key is a hash of the seed and of where the document came from (`permutation.sort_keys`), and the shuffled order is
the order of the keys. Every run is sorted by key. The documents of any range of keys are therefore contiguous in every run, and
the merge can begin at any key: a worker reads one contiguous part of each run and sorts these documents. Memory is that of the
range, and many workers merge different ranges at the same time.

The space of keys is divided into `NUM_BUCKETS` buckets by their upper 16 bits. The number of tokens before each bucket, 8 bytes
each, is all that must be known of the whole corpus.

A run is two files, little-endian, for n documents:

    NAME.tokens       ids of all documents
    NAME.documents    keys uint64 [n], ends uint64 [n] (cumulative tokens, own document included), sources uint8 [n]
"""

from pathlib import Path

import numpy as np

from pipeline.data.corpus.packing import TokenizedDocuments
from pipeline.storage.whole_file import write_file

NUM_BUCKETS = 1 << 16
# A worker holds so many tokens, 64 or 128 MB, before it writes a run.
TOKENS_PER_RUN = 1 << 25

_BYTES_PER_DOCUMENT = 8 + 8 + 1


class SortedRunWriter:
    """Writer of sorted runs: collects documents, and writes them as `NAME-000`, `NAME-001`, … in `directory`."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, tokens_per_run: int = TOKENS_PER_RUN) -> None:
        self.directory = Path(directory)
        self.name = name
        self.dtype = dtype
        self.tokens_per_run = tokens_per_run
        self.num_documents = self.num_tokens = 0
        self._num_runs = self._num_buffered_tokens = 0
        self._documents: list[tuple[np.ndarray, int]] = []
        self._keys: list[int] = []

    def add(self, key: int, ids: np.ndarray, source: int) -> None:
        """Add a document, given by its key, its ids [n] with n >= 1, and the index of its source."""
        self._keys.append(key)
        self._documents.append((ids, source))
        self._num_buffered_tokens += len(ids)
        self.num_documents += 1
        self.num_tokens += len(ids)
        if self._num_buffered_tokens >= self.tokens_per_run:
            self._write()

    def close(self) -> None:
        """Write the remaining documents as the last run."""
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
        self._num_buffered_tokens = 0
        self._documents, self._keys = [], []


class SortedRuns:
    """All sorted runs of a folder, read as one shuffled sequence of documents."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.paths = sorted(Path(directory).glob("*.documents"))

    def tokens_before_bucket(self) -> np.ndarray:
        """Count the tokens before each bucket in the shuffled order, and all tokens at the end: int64 [NUM_BUCKETS + 1]."""
        tokens_in_bucket = np.zeros(NUM_BUCKETS, np.int64)
        for path in self.paths:
            keys, ends, _ = _open_index(path)
            last = np.searchsorted(keys, _bucket_edges()[1:])
            tokens_in_bucket += np.diff(np.concatenate([[0], ends])[np.concatenate([[0], last, [len(keys)]])].astype(np.int64))
        return np.concatenate([[0], np.cumsum(tokens_in_bucket)])

    def documents_in_buckets(self, first: int, last: int) -> TokenizedDocuments:
        """Read the documents of the buckets [first, last) in shuffled order."""
        # One contiguous part of each run.
        parts = [part for path in self.paths if (part := self._read(path, first, last)) is not None]

        # Concatenate the parts, and sort their documents by key.
        keys = np.concatenate([part[0] for part in parts])
        shift = np.cumsum([0, *(len(part[1].tokens) for part in parts[:-1])])
        documents = TokenizedDocuments(
            tokens=np.concatenate([part[1].tokens for part in parts]),
            starts=np.concatenate([part[1].starts + before for part, before in zip(parts, shift, strict=True)]),
            lengths=np.concatenate([part[1].lengths for part in parts]),
            sources=np.concatenate([part[1].sources for part in parts]),
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
    """Memory-map a run's keys, ends and sources. A search for a key then reads only a few pages."""
    data = np.memmap(path, np.uint8, "r")
    count = len(data) // _BYTES_PER_DOCUMENT
    return data[: 8 * count].view("<u8"), data[8 * count : 16 * count].view("<u8"), data[16 * count :]


def _bucket_edges() -> np.ndarray:
    """Return the first key of every bucket, uint64 [NUM_BUCKETS]."""
    return np.arange(NUM_BUCKETS, dtype=np.uint64) << np.uint64(64 - 16)
