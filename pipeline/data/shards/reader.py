"""Reads samples of a prepared folder, from any place in any shard, and believes nothing.

Tar readers pass over a cut between members and a flipped bit without a word. Here a sample's bytes are those between two
offsets of the shard's `.idx`, all of them, with the CRC-32 written when the shard was made; only then are they decoded
and held against the manifest. The `.crc32` itself must be the one that the manifest means: else a shard that was exchanged
for another, with both its index files, would pass for the right one. The manifest has a CRC-32 of every piece of it, a thousand
samples long, so a piece is held against that when it is read, before any of its samples is, and a reader of few samples of a
shard reads little else of it. Of the `.idx` it reads the offsets of its samples, or of the whole piece if these are many.

Samples are asked for many at a time. Those that lie side by side in a shard come by one read, those of remote shards by
requests side by side. Of the indices only some pieces are kept at a time, and shards are closed again, so memory and open
files grow neither with a shard nor with their number.
"""

import errno
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from pipeline.data.errors import DataError
from pipeline.data.lru_cache import LeastRecentlyUsed
from pipeline.data.shards.index import IndexPiece, OpenShard, Run
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest
from pipeline.data.shards.sample import DamageError, Sample, SampleDecoder
from pipeline.data.shards.table import PIECE_SAMPLES, ShardTable
from pipeline.data.shards.writer import CRC, OFFSET
from pipeline.storage.faults import raise_if_gone, raise_if_of_the_machine
from pipeline.storage.files import DIRECT, Access, OpenFile, StorageError
from pipeline.storage.location import Place, Url

MAX_OPEN_SHARDS = 64
_MAX_INDEX_PIECES = 1024
_MAX_RUN_BYTES = 8 * 2**20
_REQUESTS_AT_ONCE = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


class DamagedSampleError(DataError):
    """A sample that is damaged, missing or does not fit the manifest; the message names shard and sample."""


class ShardReader:
    """Reads samples by shard and sample index, from at most `max_open_shards` shards (3 files each)."""

    def __init__(
        self, directory: Place, manifest: Manifest, access: Access = DIRECT, max_open_shards: int = MAX_OPEN_SHARDS
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self._table = ShardTable.of(manifest.shards)
        self._closed = threading.Event()
        self._access = replace(access, abandoned=self._closed)
        self._decoder = SampleDecoder(manifest)
        self._open: LeastRecentlyUsed[int, OpenShard] = LeastRecentlyUsed(max_open_shards, OpenShard.close)
        self._indices: LeastRecentlyUsed[tuple[int, int], IndexPiece] = LeastRecentlyUsed(_MAX_INDEX_PIECES)
        self._opening = threading.Lock()
        self._is_remote = isinstance(directory, Url) and not directory.is_pipe
        self._pool: ThreadPoolExecutor | None = None

    def read(self, shard_index: int, sample_index: int) -> Sample:
        """Read and check one sample.

        Raises:
            DamagedSampleError: the sample is damaged or does not fit the manifest.
            DataError: it cannot be reached.
            IndexError: the manifest has no such sample.
        """
        shard = self.manifest.shards[shard_index]
        if not 0 <= sample_index < shard.samples:
            raise IndexError(f"shard {shard.name} has samples 0 to {shard.samples - 1}, not {sample_index}")
        (sample,) = self.read_many([shard_index], [sample_index])
        if sample.damage is not None:
            raise DamagedSampleError(sample.damage)
        return sample

    def read_many(self, shards: Sequence[int], samples: Sequence[int]) -> list[Sample]:
        """Read and check many samples, each named by shard and sample index. In the place of one that is damaged comes a
        row without valid pairs, whose `damage` is the message.

        Raises:
            DataError: data cannot be reached.
        """
        found: list[Sample | None] = [None] * len(shards)
        try:
            for places_of_shards in self._together(shards):
                self._read_places(places_of_shards, samples, found)
                # What seems to be damaged may be where a damaged copy of the index, in the cache, says it is.
                doubtful = self._with_forgotten_index(places_of_shards, samples, found)
                if doubtful:
                    self._read_places(doubtful, samples, found)
        except StorageError as error:
            raise DataError(str(error)) from None
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Close all files and let all threads end; what they read is repeated no more, and nobody reads again."""
        self._closed.set()
        self._open.clear()
        if self._pool is not None:
            # Without waiting: an abandoned reader may be collected in the very thread that its requests wait for.
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _read_places(self, places_of_shards: dict[int, list[int]], samples: Sequence[int], found: list[Sample | None]) -> None:
        """Read what is wanted at these places of the caller's list into `found`."""
        wanted = {shard: [samples[place] for place in places] for shard, places in places_of_shards.items()}
        runs = list(self._runs(places_of_shards, wanted, self._index_pieces(wanted), found))
        for run, read in zip(runs, self._map(self._read_run, runs), strict=True):
            for place, sample in zip(run.places, read, strict=True):
                found[place] = sample

    def _with_forgotten_index(
        self, places_of_shards: dict[int, list[int]], samples: Sequence[int], found: Sequence[Sample | None]
    ) -> dict[int, list[int]]:
        """The places of damaged samples, as `places_of_shards` has them, of whose index there were copies; these are gone."""
        doubtful: dict[int, list[int]] = {}
        for shard, places in places_of_shards.items():
            damaged = [place for place in places if (sample := found[place]) is not None and sample.damage is not None]
            pieces = {samples[place] // PIECE_SAMPLES for place in damaged}
            forgotten = {piece for piece in pieces if self._forget_index(shard, piece)}
            if again := [place for place in damaged if samples[place] // PIECE_SAMPLES in forgotten]:
                doubtful[shard] = again
        return doubtful

    def _forget_index(self, shard: int, piece: int) -> bool:
        self._indices.drop((shard, piece))
        if not self._is_remote:  # no copies; and to look for them a pipe would be run
            return False
        _, idx, crc32 = self._files(shard)
        offsets, checksums = self._piece(shard, piece)
        had_offsets = idx.forget(*offsets)
        return crc32.forget(*checksums) or had_offsets

    def _together(self, shards: Sequence[int]) -> Iterator[dict[int, list[int]]]:
        """Places in the caller's list by shard: remote shards all at once; others one by one, lest one be closed, to keep
        open files bounded, while it is read."""
        places: dict[int, list[int]] = {}
        for place, shard in enumerate(shards):
            places.setdefault(int(shard), []).append(place)
        if self._is_remote:
            yield places
        else:
            yield from ({shard: of_shard} for shard, of_shard in places.items())

    def _map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterable[Result]:
        if not self._is_remote or len(items) < 2:
            return map(function, items)
        if self._closed.is_set():  # by another thread than the one that reads: nobody would end a new pool's threads
            raise StorageError(f"{self.directory}: not read; its reader was closed meanwhile")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
        return self._pool.map(function, items)

    def _index_pieces(self, wanted: dict[int, list[int]]) -> dict[tuple[int, int], IndexPiece | Exception]:
        """The pieces of the index that hold the wanted samples, by (shard, number), with the offsets of these at least."""
        of_pieces: dict[tuple[int, int], list[int]] = {}
        for shard, samples in wanted.items():
            for sample in samples:
                of_pieces.setdefault((shard, sample // PIECE_SAMPLES), []).append(sample)
        known = {name: self._indices.find(name) for name in sorted(of_pieces)}
        pieces: dict[tuple[int, int], IndexPiece | Exception]
        pieces = {name: piece for name, piece in known.items() if piece is not None and not piece.lacking(of_pieces[name])}
        unread = [name for name in known if name not in pieces]
        read = self._map(lambda name: self._read_index(name, known[name], of_pieces[name]), unread)
        for name, piece in zip(unread, read, strict=True):
            if not isinstance(piece, Exception):
                self._indices.put(name, piece)
            pieces[name] = piece
        return pieces

    def _read_index(
        self, name: tuple[int, int], piece: IndexPiece | None, samples: Sequence[int]
    ) -> IndexPiece | DamageError | OSError:
        try:
            _, idx, crc32 = self._files(name[0])
            if piece is None:
                checksums = crc32.read(*self._piece(*name)[1])
                expected, found = self._table.piece_crc32(*name), zlib.crc32(checksums)
                if expected is not None and found != expected:
                    return DamageError(
                        f"the CRC-32 of its piece of its shard's .crc32 is {found:08x}, the manifest has {expected:08x}: the "
                        "file is damaged, or the shard was exchanged for another"
                    )
                piece = IndexPiece(name[1], int(self._table.samples[name[0]]), checksums)
            piece.read_offsets(idx, samples, one_by_one=not self._is_remote)
        except OSError as error:
            self._raise_if_no_damage(error)
            return error
        return piece

    def _piece(self, shard: int, piece: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the offsets and the checksums of a piece lie in their files, and their sizes."""
        first = piece * PIECE_SAMPLES
        count = min(PIECE_SAMPLES, int(self._table.samples[shard]) - first)
        return (OFFSET.itemsize * first, OFFSET.itemsize * (count + 1)), (CRC.itemsize * first, CRC.itemsize * count)

    def _files(self, shard: int) -> list[OpenFile]:
        with self._opening:  # requests side by side ask for files side by side
            opened = self._open.get(shard, lambda: OpenShard(self.directory, self.manifest.shards[shard], self._access))
            # A list of their own, for the next request may close the shard. A remote file, which holds nothing open, is read
            # all the same; of others there is one request at a time.
            return list(opened.files)

    def _runs(
        self,
        places_of_shards: dict[int, list[int]],
        wanted: dict[int, list[int]],
        pieces: dict[tuple[int, int], IndexPiece | Exception],
        found: list[Sample | None],
    ) -> Iterator[Run]:
        """The wanted samples as runs; those that the index does not place go to `found` as damaged."""
        for shard, samples in wanted.items():
            run: Run | None = None
            for sample, place in sorted(zip(samples, places_of_shards[shard], strict=True)):
                try:
                    start, end, checksum = self._extent(shard, sample, pieces[shard, sample // PIECE_SAMPLES])
                except (DamageError, OSError) as damage:
                    found[place] = self._blank(shard, sample, damage)
                    continue
                if run is not None and run.offsets[-1] == start and end - run.offsets[0] <= _MAX_RUN_BYTES:
                    run.places.append(place)
                    run.samples.append(sample)
                    run.offsets.append(end)
                    run.checksums.append(checksum)
                    continue
                if run is not None:
                    yield run
                run = Run(shard, [place], [sample], [start, end], [checksum])
            if run is not None:
                yield run

    def _extent(self, shard: int, sample: int, piece: IndexPiece | Exception) -> tuple[int, int, int]:
        if isinstance(piece, Exception):
            raise piece
        extent, num_bytes = piece.extent(sample), self._table.sizes[shard]
        if extent is None:
            raise DamageError("its .idx or .crc32 ends before it")
        start, end, _ = extent
        if not start < end <= num_bytes:
            raise DamageError(f"its .idx puts it at bytes {start} to {end} of {num_bytes}")
        if end - start > self._decoder.max_bytes:
            raise DamageError(f"its .idx gives it {end - start} bytes, a row has at most {self._decoder.max_bytes}")
        return extent

    def _read_run(self, run: Run) -> list[Sample]:
        start, size = run.offsets[0], run.offsets[-1] - run.offsets[0]
        try:
            tar = self._files(run.shard)[0]
            read = self._decode_all(tar.read(start, size), run)
            # A copy in the cache may be the damaged one.
            if any(sample.damage is not None for sample in read) and tar.forget(start, size):
                read = self._decode_all(tar.read(start, size), run)
            return read
        except OSError as error:
            self._raise_if_no_damage(error)
            return [self._blank(run.shard, sample, error) for sample in run.samples]

    def _raise_if_no_damage(self, error: OSError) -> None:
        raise_if_of_the_machine(error, self.directory, MANIFEST_FILE)
        if isinstance(self.directory, Url) and error.errno == errno.ENOENT:
            raise_if_gone(self.directory / MANIFEST_FILE, self._access)

    def _decode_all(self, data: bytes, run: Run) -> list[Sample]:
        return [self._decode(data, run, index) for index in range(len(run.samples))]

    def _decode(self, data: bytes, run: Run, index: int) -> Sample:
        start, end = (offset - run.offsets[0] for offset in run.offsets[index : index + 2])
        own = data[start:end]
        try:
            if len(own) != end - start:
                raise DamageError(f"expected {end - start} bytes at {run.offsets[index]} of the tar, got {len(own)}")
            if zlib.crc32(own) != run.checksums[index]:
                raise DamageError(f"its CRC-32 is {zlib.crc32(own):08x}, expected {run.checksums[index]:08x}")
            return self._decoder.decode(own, self._table.name(run.shard))
        except DamageError as damage:
            return self._blank(run.shard, run.samples[index], damage)

    def _blank(self, shard: int, sample: int, damage: Exception) -> Sample:
        name = self._table.name(shard)
        message = (
            f"shard {name}, sample {sample}, in {self.directory} is damaged: {damage}; "
            "copy the shard and its .idx and .crc32 again from where the data was prepared, or prepare again"
        )
        return self._decoder.blank(f"{name}/(damaged: sample {sample})", message)
