"""The files of a shard: their names and sizes, and what it means if one cannot be read."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.data.errors import DataError
from pipeline.data.shards.table import Shard
from pipeline.storage.faults import raise_if_machine_fault
from pipeline.storage.files import StorageError
from pipeline.storage.lfs_pointer import pointer_problem

MANIFEST_FILE = "manifest.json"


def raise_machine_fault_as_data_error(error: OSError, folder: Path) -> None:
    """Return if `error` means that a file of `folder` is missing or cut; otherwise the machine is at fault, and it is raised.

    Raises:
        DataError: the machine cannot read the file.
    """
    try:
        raise_if_machine_fault(error, folder, MANIFEST_FILE)
    except StorageError as fault:
        raise DataError(str(fault)) from None


def size_problems(directory: Path, shard: Shard) -> Iterator[str]:
    """Check a shard's files: yields a message for each that is missing or has another size than the manifest says.

    Raises:
        DataError: the machine cannot read the folder.
    """
    expected = {
        f"{shard.name}.tar": shard.bytes,
        f"{shard.name}.tar.idx": 8 * (shard.samples + 1),
        f"{shard.name}.tar.crc32": 4 * shard.samples,
    }

    for name, size in expected.items():
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            raise_machine_fault_as_data_error(error, directory)
            yield (
                f"shard {shard.name}: {directory / name} cannot be found, but the manifest lists it; "
                "copy it again from where the data was prepared, or prepare again"
            )
            continue
        if found != size:
            yield pointer_problem(directory / name) or (
                f"shard {shard.name}: {directory / name} has {found} bytes, expected {size}; "
                "the file is cut or not of this data set: copy it again, or prepare again"
            )
