"""Writing cached reference losses: piece by piece, by many processes, and resumable.

Scoring writes to a folder `….partial`, one file for each finished *piece* of up to 1,024 samples of a shard; existing pieces
are not computed again. At the end the pieces of each shard are joined and the folder is renamed. `reference_losses` documents
the files.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest
from pipeline.data.shards.reference_losses import STORED_DTYPES, LossesManifest, losses_folder
from pipeline.data.shards.writer import CRC
from pipeline.storage.whole_file import atomic_write, publish, write_file

_PIECE_SAMPLES = 1024

Piece = tuple[int, int, int]
"""(shard, first, end): the samples [first, end) of a shard, scored and stored together."""


class LossesWriter:
    """Writer of a data set's losses, piece by piece, for any number of processes that share a file system.

    One process calls `begin`; then all processes `write` pieces and `join` shards; at the end one process calls `finish`.

    Args:
        cache: the cache directory.
        losses: the manifest to write.
        data: the manifest of the data set.
    """

    def __init__(self, cache: Path, losses: LossesManifest, data: Manifest) -> None:
        self.folder = losses_folder(cache, losses.data_sha256)
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")
        self._losses, self._data = losses, data

    def begin(self) -> list[Piece] | None:
        """Begin or resume: create the partial folder and list the missing pieces; None if the folder is complete.

        Raises:
            DataError: the existing folder, complete or partial, was made with another reference or setting.
        """
        for folder in (self.folder, self.partial):
            if (folder / MANIFEST_FILE).is_file():
                found = json.loads((folder / MANIFEST_FILE).read_text())
                differing = [key for key, value in self._losses.model_dump().items() if found.get(key) != value]
                if [key for key in differing if key != "reference"]:
                    raise DataError(
                        f"{folder} was made with other settings ({', '.join(differing)}); remove it, or name another"
                    )
        if (self.folder / MANIFEST_FILE).is_file():
            return None
        self.partial.mkdir(parents=True, exist_ok=True)
        write_file(self.partial / MANIFEST_FILE, (self._losses.model_dump_json(indent=1) + "\n").encode())
        return [piece for piece in self._pieces() if not self._file_of(piece).is_file()]

    def write(self, piece: Piece, losses_NTC: np.ndarray) -> None:
        """Write the losses of a piece, float32 [N, T, C] for its N samples."""
        write_file(self._file_of(piece), losses_NTC.astype(STORED_DTYPES[self._losses.dtype]).tobytes())

    def join(self, shard: int) -> None:
        """Concatenate the pieces of a shard, all of which must have been written, and write the checksums."""
        of, size = self._data.shards[shard], self._losses.sample_bytes
        checksums = []
        with atomic_write(self.partial / f"{of.name}.losses") as file:
            for piece in self._pieces_of(shard):
                data = memoryview(self._file_of(piece).read_bytes())
                checksums += [self._losses.checksum(of, data[start : start + size]) for start in range(0, len(data), size)]
                file.write(data)
        write_file(self.partial / f"{of.name}.losses.crc32", np.array(checksums, CRC).tobytes())

    def finish(self) -> None:
        """Remove the pieces and rename the folder to its final name, after all shards were joined."""
        # *.tmp are files that a killed process left unfinished.
        for leftover in {*self.partial.glob("*.piece*"), *self.partial.glob("*.tmp")}:
            leftover.unlink()
        publish(self.partial, self.folder)

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
