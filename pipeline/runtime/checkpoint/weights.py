"""The weights of a checkpoint, tensor by tensor, without an engine, whatever ranks and ZeRO stage wrote it.

A file's SHA-256 is that of all of it, optimizer states included, so everything is read once to be verified. Then each tensor is
put together out of its fragments when it is asked for, and no more than that one is in memory.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from pipeline.runtime.checkpoint.folders import problem_of, reason
from pipeline.runtime.checkpoint.fragment_file import Entry, FileError, Piece, read_header, read_pieces
from pipeline.runtime.checkpoint.fragments import FROZEN, MASTER
from pipeline.runtime.checkpoint.state import State


class CheckpointError(ValueError):
    """A checkpoint is not what was written; the message names the file."""


class CheckpointWeights:
    """The weights of one checkpoint folder.

    Raises:
        CheckpointError: a file is missing, or its bytes are not those that were written.
    """

    def __init__(self, directory: Path, state: State):
        self.directory = directory
        self.state = state
        self._headers: dict[str, dict[str, Entry]] = {}
        problems = [problem for file in state.files if (problem := problem_of(directory, file)) is not None]
        if problems:
            raise CheckpointError(f"{directory.name}: {'; '.join(problems)}")

    def tensor(self, name: str) -> Tensor:
        """Read a parameter by its name in the model: its float32 master value, or a frozen one in the dtype it was saved in.

        Raises:
            CheckpointError: the file cannot be read.
        """
        saved = self.state.parameters[name]
        stored = f"{name}|{FROZEN if saved.kinds == [FROZEN] else MASTER}"
        values: Tensor | None = None
        for file, first, count in saved.fragments:
            path = self.directory / self.state.files[file].name
            try:
                entry = self._entry(path, stored, count)
                if values is None:
                    values = torch.empty(math.prod(saved.shape), dtype=entry.dtype)
                read_pieces(path, [Piece(entry.offset, values.narrow(0, first, count))], hashed=False)
            except (OSError, FileError) as error:
                raise CheckpointError(f"{self.directory.name}: {path.name}: {reason(error)}") from None
        assert values is not None, "`state.json` was checked to cover every value"
        return values.view(saved.shape)

    def _entry(self, path: Path, stored: str, count: int) -> Entry:
        """Look up where a fragment lies in a file, whose header is read once."""
        if path.name not in self._headers:
            self._headers[path.name] = read_header(path)
        entry = self._headers[path.name].get(stored)
        if entry is None or entry.numel != count:
            raise FileError(f"expected {count} values of {stored}, got {entry.numel if entry else 0}")
        return entry
