"""Writing cached reference losses: piece by piece, by many processes, and resumable.

Scoring writes to a folder `….partial`, one file for each finished *piece* of up to 1,024 samples of a shard: their losses, then
uint32 checksums, one a sample. A piece whose checksums hold is not computed again; one that is cut, damaged or of another shard
is. At the end the pieces of each shard are joined and the folder is renamed. `reference_losses` documents the files.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest
from pipeline.data.shards.reference_losses import STORED_DTYPES, LossesManifest, losses_folder, partial_losses_folder
from pipeline.data.shards.writer import CRC
from pipeline.storage.whole_file import atomic_write, publish, write_file

_PIECE_SAMPLES = 1024

Piece = tuple[int, int, int]
"""(shard, first, end): the samples [first, end) of a shard, scored and stored together."""


class LossesWriter:
    """Writer of a data set's losses, piece by piece, for any number of processes that share a file system.

    One process calls `begin`; then all processes `write` the pieces that are `missing` and `join` shards; at the end one
    process calls `finish`.

    Args:
        cache: the cache directory.
        losses: the manifest to write.
        data: the manifest of the data set.
    """

    def __init__(self, cache: Path, losses: LossesManifest, data: Manifest) -> None:
        self.folder = losses_folder(cache, losses.data_sha256)
        self.partial = partial_losses_folder(self.folder)
        self._losses, self._data = losses, data

    def begin(self) -> bool:
        """Begin or resume by creating the partial folder; returns true if the folder is finished already.

        Raises:
            DataError: the existing folder, complete or partial, was made with another reference or setting.
        """
        for folder in (self.folder, self.partial):
            if (folder / MANIFEST_FILE).is_file():
                differing = self._differing(folder / MANIFEST_FILE)
                if differing:
                    raise DataError(
                        f"{folder} was made with other settings ({', '.join(differing)}); remove it, or name another"
                    )
        if (self.folder / MANIFEST_FILE).is_file():
            return True
        self.partial.mkdir(parents=True, exist_ok=True)
        write_file(self.partial / MANIFEST_FILE, (self._losses.model_dump_json(indent=1) + "\n").encode())
        return False

    def missing(self, rank: int = 0, world_size: int = 1) -> list[Piece]:
        """List the pieces that are still to be computed, among every `world_size`-th piece from number `rank` on.

        Every byte of the others is read, so that what is kept is known by its content.
        """
        return [piece for piece in list(self._pieces())[rank::world_size] if self._read(piece) is None]

    def damaged(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """Name the shards, of every `world_size`-th from number `rank` on, whose losses in the finished folder are damaged."""
        shards = range(rank, len(self._data.shards), world_size)
        return [self._data.shards[shard].name for shard in shards if not self._is_whole(shard)]

    def write(self, piece: Piece, losses_NTC: np.ndarray) -> None:
        """Write the losses of a piece, float32 [N, T, C] for its N samples."""
        data = losses_NTC.astype(STORED_DTYPES[self._losses.dtype]).tobytes()
        write_file(self._file_of(piece), data + self._checksums(piece[0], data))

    def join(self, shard: int) -> None:
        """Concatenate the pieces of a shard, all of which must have been written, and their checksums.

        Raises:
            DataError: a piece was damaged since it was written.
        """
        of, checksums = self._data.shards[shard], []
        with atomic_write(self.partial / f"{of.name}.losses") as file:
            for piece in self._pieces_of(shard):
                read = self._read(piece)
                if read is None:
                    raise DataError(
                        f"{self._file_of(piece)}: missing or damaged since it was written; run the same command again"
                    )
                file.write(read[0])
                checksums.append(read[1])
        write_file(self.partial / f"{of.name}.losses.crc32", b"".join(checksums))

    def finish(self) -> None:
        """Remove the pieces and rename the folder to its final name, after all shards were joined."""
        # *.tmp are files that a killed process left unfinished.
        for leftover in {*self.partial.glob("*.piece*"), *self.partial.glob("*.tmp")}:
            leftover.unlink()
        publish(self.partial, self.folder)

    def _differing(self, file: Path) -> list[str]:
        """The keys in which the manifest in a file differs from this one's; the location of the reference may."""
        try:
            found = json.loads(file.read_text())
            return [key for key, value in self._losses.model_dump().items() if key != "reference" and found.get(key) != value]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{file} cannot be read ({error}); remove its folder, or name another") from None

    def _checksums(self, shard: int, data: bytes | memoryview) -> bytes:
        """The checksums of a shard's samples whose losses follow one another in `data`."""
        of, size, view = self._data.shards[shard], self._losses.sample_bytes, memoryview(data)
        checksums = [self._losses.checksum(of, view[start : start + size]) for start in range(0, len(view), size)]
        return np.array(checksums, CRC).tobytes()

    def _read(self, piece: Piece) -> tuple[memoryview, memoryview] | None:
        """(losses, checksums) of a piece; None if it is not there as it was written."""
        shard, first, end = piece
        try:
            content = memoryview(self._file_of(piece).read_bytes())
        except FileNotFoundError:
            return None
        size = (end - first) * self._losses.sample_bytes
        losses, checksums = content[:size], content[size:]
        return (losses, checksums) if len(losses) == size and self._checksums(shard, losses) == checksums else None

    def _is_whole(self, shard: int) -> bool:
        of = self._data.shards[shard]
        try:
            losses, checksums = ((self.folder / f"{of.name}.{suffix}").read_bytes() for suffix in ("losses", "losses.crc32"))
        except FileNotFoundError:
            return False
        return len(losses) == of.samples * self._losses.sample_bytes and self._checksums(shard, losses) == checksums

    def _pieces(self) -> Iterator[Piece]:
        for shard in range(len(self._data.shards)):
            yield from self._pieces_of(shard)

    def _pieces_of(self, shard: int) -> Iterator[Piece]:
        samples = self._data.shards[shard].samples
        for first in range(0, samples, _PIECE_SAMPLES):
            yield shard, first, min(first + _PIECE_SAMPLES, samples)

    def _file_of(self, piece: Piece) -> Path:
        shard, first, _ = piece
        return self.partial / f"{self._data.shards[shard].name}.{first:08d}.piece"
