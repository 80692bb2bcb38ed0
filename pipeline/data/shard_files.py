"""The three files of a shard, and what is read of its tar at once."""

from dataclasses import dataclass

from pipeline.data.shard_table import Shard
from pipeline.data.shards import CRC, OFFSET
from pipeline.storage.files import Access, OpenFile, open_file
from pipeline.storage.location import Place


@dataclass(frozen=True)
class Run:
    """Samples side by side in a shard: their places in the caller's list, numbers, offsets (one more) and checksums."""

    shard: int
    places: list[int]
    samples: list[int]
    offsets: list[int]
    checksums: list[int]


class OpenShard:
    """The three files of a shard."""

    def __init__(self, place: Place, shard: Shard, access: Access) -> None:
        self.files: list[OpenFile] = []
        indices = {"tar.idx": OFFSET.itemsize * (shard.samples + 1), "tar.crc32": CRC.itemsize * shard.samples}
        try:
            for suffix, size in ({"tar": shard.bytes} | indices).items():
                self.files.append(open_file(place / f"{shard.name}.{suffix}", size, access))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        while self.files:
            self.files.pop().close()
