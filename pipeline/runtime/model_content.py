"""The identity of a model folder, by content: the SHA-256 of every byte of its weights and of its config.json.

Sizes, dates and samples of the bytes are not enough: `rope_theta` is a few bytes of config.json, and one value in the middle of
a tensor changes every loss. So each start of a job reads a model it depends on in full, once a node: the ranks of a node
share the pieces of its files, each hashing with several threads, and all ranks learn all digests. Nodes whose files differ
are found by that too. The result is remembered for the rest of the start, and never longer.

Beside the fingerprint stands a little of what it was made from, for a message that says what in a changed model differs.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.model.huggingface import ModelFilesError, model_files
from pipeline.model.layout import layout_of
from pipeline.model.model_config import read_json
from pipeline.runtime.distributed import World, gather_over_ranks

PIECE_BYTES = 64 * 2**20
"""Size of the pieces of a file that are hashed side by side; part of the fingerprint."""
_BLOCK_BYTES = 2**20
_LONG, _SHORT = 60, 16
"""Characters of a value that is kept as it is, and of a hash that only tells two from each other."""

Piece = tuple[str, int, int]
"""(file's name, first byte, bytes)."""


class ModelContent(NamedTuple):
    """The content of a model folder: its fingerprint, hashes of its files, and the values of its config.json, by name."""

    sha256: str
    files: dict[str, str]
    config: dict[str, str]


class ModelFingerprints:
    """Fingerprints of model folders, each computed once in the start of a job."""

    def __init__(self, world: World):
        self._world = world
        self._known: dict[Path, ModelContent] = {}

    def of(self, directory: Path | None) -> str | None:
        """Return the fingerprint of a folder, None of None. Collective: all ranks ask for the same folders in one order.

        Raises:
            ModelFilesError: on all ranks alike, if a rank cannot read the files, or nodes have different ones.
        """
        return None if directory is None else self.content(directory).sha256

    def content(self, directory: Path) -> ModelContent:
        """Return the content of a folder; as `of`."""
        if directory.absolute() not in self._known:
            self._known[directory.absolute()] = read_model_content(directory, self._world)
        return self._known[directory.absolute()]


def read_model_content(directory: Path, world: World) -> ModelContent:
    """Hash a model folder, the ranks of each node together; arguments and errors as `ModelFingerprints.of`."""
    by_rank = gather_over_ranks(_hash_share(directory, world))
    failure = next((failure for _, _, failure in by_rank if failure is not None), None)
    if failure is not None:
        raise agreed(failure)

    # All ranks see the same files, and all hashes of a piece are equal.
    pieces, digests = by_rank[0][0], dict[Piece, bytes]()
    for rank, (found, hashed, _) in enumerate(by_rank):
        differing = [piece for piece, digest in hashed.items() if digests.setdefault(piece, digest) != digest]
        if found != pieces or differing:
            name = (differing or sorted({*found} ^ {*pieces}))[0][0]
            raise agreed(f"{directory}: {name} is another file for rank {rank} than for those before it; copy the folder again")
    assert digests.keys() == set(pieces), "the ranks' places on their nodes leave parts of the model to nobody"
    whole = hashlib.sha256(json.dumps([[*piece, digests[piece].hex()] for piece in pieces]).encode()).hexdigest()
    return ModelContent(whole, _hashes(digests), _values(read_json(directory / layout_of(directory).description)))


def _hashes(digests: Mapping[Piece, bytes]) -> dict[str, str]:
    """The beginning of each file's hash."""
    files: dict[str, Any] = {}
    for (name, _, _), digest in sorted(digests.items()):
        files.setdefault(name, hashlib.sha256()).update(digest)
    return {name: digest.hexdigest()[:_SHORT] for name, digest in files.items()}


def _values(config: Mapping[str, Any]) -> dict[str, str]:
    """The values of a config.json as text; of a long one the beginning of its hash."""
    texts = {key: json.dumps(value, sort_keys=True) for key, value in config.items()}
    return {
        key: text if len(text) <= _LONG else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:_SHORT]}"
        for key, text in texts.items()
    }


def agreed(message: str) -> ModelFilesError:
    """An error that all ranks raise alike, so that one of them prints it."""
    error = ModelFilesError(message)
    error.agreed = True
    return error


def _hash_share(directory: Path, world: World) -> tuple[list[Piece], dict[Piece, bytes], str | None]:
    """(all pieces, digests of this rank's share of its node's, failure). Failures are returned, so that all ranks can raise."""
    try:
        pieces = list(_pieces(directory))
        share = pieces[world.local_rank :: world.local_size]
        # hashlib and reading let other threads run; a few more than cores hide the wait for a network's file system.
        with ThreadPoolExecutor(max(4, torch.get_num_threads())) as threads:
            digests = list(threads.map(lambda piece: _hash_piece(directory, piece), share))
    except ModelFilesError as error:
        return [], {}, str(error)
    except OSError as error:
        return [], {}, f"{error.filename or directory}: cannot be read: {error.strerror or error}"
    return pieces, dict(zip(share, digests, strict=True)), None


def _pieces(directory: Path) -> Iterator[Piece]:
    for file in model_files(directory):
        size = file.stat().st_size
        for start in range(0, max(1, size), PIECE_BYTES):
            yield file.name, start, min(PIECE_BYTES, size - start)


def _hash_piece(directory: Path, piece: Piece) -> bytes:
    name, start, left = piece
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(left, _BLOCK_BYTES)))
    with (directory / name).open("rb", buffering=0) as file:
        file.seek(start)
        while left:
            count = file.readinto(buffer[:left])
            if not count:
                raise OSError(None, "it became shorter while it was read", str(directory / name))
            digest.update(buffer[:count])
            left -= count
    return digest.digest()
