"""The open files of a prepared folder's shards, of which only so many are kept."""

import errno
import threading

from pipeline.data.lru_cache import LRUCache
from pipeline.data.shards.manifest import MANIFEST_FILE, Manifest
from pipeline.data.shards.table import Shard
from pipeline.data.shards.writer import CRC, OFFSET
from pipeline.storage.faults import raise_if_folder_unreachable, raise_if_machine_fault
from pipeline.storage.files import Access, OpenFile, open_file
from pipeline.storage.location import Location, Url


class OpenShard:
    """The three open files of a shard: tar, offsets and checksums, in this order."""

    def __init__(self, location: Location, shard: Shard, access: Access) -> None:
        self.files: list[OpenFile] = []
        indices = {"tar.idx": OFFSET.itemsize * (shard.samples + 1), "tar.crc32": CRC.itemsize * shard.samples}
        try:
            for suffix, size in ({"tar": shard.bytes} | indices).items():
                self.files.append(open_file(location / f"{shard.name}.{suffix}", size, access))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close all files."""
        while self.files:
            self.files.pop().close()


class OpenShards:
    """The shards of a folder that were read last, at most `max_open_shards` of them, 3 files each; for many threads.

    is_remote: true if the folder is read by requests, which are worth making in parallel.
    """

    def __init__(self, directory: Location, manifest: Manifest, access: Access, max_open_shards: int) -> None:
        self.is_remote = isinstance(directory, Url) and not directory.is_pipe
        self._directory = directory
        self._manifest = manifest
        self._access = access
        self._shards: LRUCache[int, OpenShard] = LRUCache(max_open_shards, OpenShard.close)
        self._lock = threading.Lock()

    def files(self, shard: int) -> list[OpenFile]:
        """Get the open tar, offsets and checksums of a shard."""
        with self._lock:  # of parallel requests
            opened = self._shards.get(shard, lambda: OpenShard(self._directory, self._manifest.shards[shard], self._access))
            # A copy, because the next request may evict and close the shard; a closed remote file can still be read.
            return list(opened.files)

    def raise_if_machine_fault(self, error: OSError) -> None:
        """Return if `error` means that a file is missing or cut.

        Raises:
            StorageError: the machine or the storage is at fault.
        """
        raise_if_machine_fault(error, self._directory, MANIFEST_FILE)
        if isinstance(self._directory, Url) and error.errno == errno.ENOENT:
            raise_if_folder_unreachable(self._directory / MANIFEST_FILE, self._access)

    def close(self) -> None:
        """Close all files."""
        self._shards.clear()
