"""Write a checkpoint in the background, and make it one: complete on disk, or absent.

    begin    the training thread copies this rank's fragments into host buffers that are kept from save to save
    write    a thread writes them to `step-….partial`, hashes and syncs, and looks for numbers that are not finite
    commit   once all ranks have written: the first rank's thread writes state.json, renames the folder, and then `latest`

`go_on` leads from each to the next, at the end of a later step, when all ranks have agreed that the one before is done.

Every file and folder goes through the one synced write (`storage.whole_file`), so that a loss of power leaves the checkpoint
before or the new one.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.checkpoint.folders import NONE_YET, PARTIAL, POINTER_FILE, step_name
from pipeline.runtime.checkpoint.fragment_file import write_tensors
from pipeline.runtime.checkpoint.fragments import FROZEN, MASTER, STATES, Fragment, fragments_of, optimizer_step
from pipeline.runtime.checkpoint.state import STATE_FILE, Kind, SavedFile, SavedParameter, State, encode
from pipeline.runtime.distributed import World, broadcast_from_first, gather_over_ranks
from pipeline.runtime.memory import free_bytes
from pipeline.runtime.parameters import full_shape
from pipeline.storage.whole_file import free_on_disk, publish, write_file

_SPARE_BYTES = 2**20
_SHARE_OF_FREE_MEMORY = 0.5


class SaveError(RuntimeError):
    """A checkpoint was not saved; the last one is as it was. The same on all ranks."""


class Saved(NamedTuple):
    """A committed checkpoint. seconds: from its beginning on. waited: seconds of them in which training stood still."""

    step: int
    num_bytes: int
    seconds: float
    waited: float


def remove(folder: Path) -> None:
    """Remove a folder, or the link to one that a user has moved elsewhere; what cannot be removed stays."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@dataclass
class _Written:
    """What a rank's thread has done. fragments: [name, first value, number of values] of each fragment in the file."""

    file: SavedFile | None = None
    fragments: list[tuple[str, int, int]] = field(default_factory=list)
    problem: str | None = None


class Writer:
    """Writes the checkpoints of one run, one at a time. `begin` and `go_on` are collective."""

    def __init__(self, directory: Path, world: World):
        self.directory = directory
        self.world = world
        self._buffers: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[list[int], list[Kind]]] = {}
        self._pending: _Pending | None = None

    @property
    def is_busy(self) -> bool:
        """True from `begin` until `go_on` returns what was saved, or raises."""
        return self._pending is not None

    @property
    def is_done(self) -> bool:
        """True if this rank's thread has nothing left to do; other ranks' may have."""
        return self._pending is not None and not self._pending.thread.is_alive()

    def begin(self, engine: Any, content: dict[str, Any], step: int) -> None:
        """Copy what is to be saved and start to write it.

        content: of `State`, but for what the writer itself knows.

        Raises:
            SaveError: no space is left, or the folder cannot be made.
        """
        assert self._pending is None, "the save before this one is not complete"
        started = time.perf_counter()
        partial = self.directory / f"{step_name(step)}{PARTIAL}"
        self._make_folder(partial, engine)

        self.prepare(engine)
        fragments = fragments_of(engine)
        tensors = self._copied(fragments) if self._buffers else _live(fragments)
        content = content | {"optimizer_step": optimizer_step(engine)}

        written = _Written(fragments=[(fragment.name, fragment.start, fragment.numel) for fragment in fragments])
        thread = start_thread(self._write, partial, tensors, written)
        if not self._buffers:
            # Without buffers what is written is what training would change.
            thread.join()
        self._pending = _Pending(step, content, written, thread, started, time.perf_counter() - started)

    def go_on(self) -> Saved | None:
        """Wait for all ranks' threads and take the next step: None once the commit has begun, what was saved once it is done.

        Raises:
            SaveError: a rank could not write its part, or a weight is not finite. Nothing is left of the attempt.
        """
        pending = self._pending
        assert pending is not None
        started = time.perf_counter()
        pending.thread.join()
        if pending.of_ranks is None:
            self._begin_commit(pending)
            pending.waited += time.perf_counter() - started
            return None
        self._end_commit(pending)
        now = time.perf_counter()
        num_bytes = sum(written.file.bytes for written in pending.of_ranks if written.file is not None)
        return Saved(pending.step, num_bytes, now - pending.started, pending.waited + now - started)

    def _begin_commit(self, pending: "_Pending") -> None:
        of_ranks: list[_Written] = gather_over_ranks(pending.written)
        problems = [f"rank {rank}: {written.problem}" for rank, written in enumerate(of_ranks) if written.problem]
        self._raise_if(problems, pending)
        pending.of_ranks = of_ranks
        if self.world.is_first:
            pending.thread = start_thread(self._publish, pending, of_ranks)

    def _end_commit(self, pending: "_Pending") -> None:
        problem = broadcast_from_first(pending.written.problem)
        self._raise_if([f"rank 0: {problem}"] if problem else [], pending)
        self._pending = None

    def _raise_if(self, problems: list[str], pending: "_Pending") -> None:
        if problems:
            self._pending = None
            self._remove(self.directory / f"{pending.name}{PARTIAL}")
            raise SaveError(f"{pending.name} was not saved: {'; '.join(problems)}")

    def _make_folder(self, partial: Path, engine: Any) -> None:
        problem = None
        if self.world.is_first:
            try:
                remove(partial)
                partial.mkdir(parents=True)
                problem = self.missing_space(engine)
            except OSError as error:
                problem = _sentence(error)
        problem = broadcast_from_first(problem)
        if problem is not None:
            self._remove(partial)
            raise SaveError(f"{partial.stem} was not saved: {problem}")

    def missing_space(self, engine: Any) -> str | None:
        """Say that the disk has no room for one more checkpoint; None if it has."""
        needed, free = _bytes_needed(engine), free_on_disk(self.directory)
        return f"{needed:,} bytes are needed in {self.directory}, {free:,} are free" if free < needed else None

    def prepare(self, engine: Any) -> None:
        """Make the host buffers, once, if there is memory for them, and note the parameters' shapes."""
        if self._shapes:
            return
        self._shapes = {
            name: (list(full_shape(parameter)), [MASTER, *STATES] if parameter.requires_grad else [FROZEN])
            for name, parameter in engine.module.named_parameters()
        }
        live = _live(fragments_of(engine))
        needed, free = sum(tensor.nbytes for tensor in live.values()), free_bytes(torch.device("cpu"), self.world.local_size)
        if needed <= _SHARE_OF_FREE_MEMORY * free:
            self._buffers = {name: _host_buffer(tensor) for name, tensor in live.items()}
            return
        # Of this rank's machine alone, so it is not left to the first rank to say.
        print(
            f"rank {self.world.rank}: training waits while checkpoints are written: to write them in the background takes "
            f"{needed:,.0f} bytes of host memory, at most half of what is free, and {free:,.0f} are free",
            flush=True,
        )

    def _copied(self, fragments: list[Fragment]) -> dict[str, Tensor]:
        """Copy live memory into the kept buffers."""
        for name, tensor in _live(fragments).items():
            if tensor.device.type == "cpu":
                # Plain memory copies, which are faster than torch's own for so much: they leave the caches alone.
                np.copyto(_as_bytes(self._buffers[name]), _as_bytes(tensor))
            else:
                self._buffers[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._buffers

    def _write(self, partial: Path, tensors: dict[str, Tensor], written: _Written) -> None:
        """Run in the thread. Whatever goes wrong is kept, to be agreed on."""
        try:
            bad = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
            if bad is not None:
                written.problem = f"{bad.replace('|', ', ')}: has a number that is not finite"
                return
            name = rank_file(self.world.rank)
            num_bytes, sha256 = write_tensors(partial / name, tensors)
            written.file = SavedFile(name=name, bytes=num_bytes, sha256=sha256)
        except Exception as error:
            written.problem = _sentence(error)

    def _publish(self, pending: "_Pending", of_ranks: list[_Written]) -> None:
        """Run in the first rank's thread: state.json, the name, and the pointer to it, in this order."""
        places: dict[str, list[list[int]]] = {name: [] for name in self._shapes}
        for rank, written in enumerate(of_ranks):
            for name, first, count in written.fragments:
                places[name].append([rank, first, count])
        parameters = {
            name: SavedParameter(shape=shape, kinds=kinds, fragments=sorted(places[name], key=lambda place: place[1]))
            for name, (shape, kinds) in self._shapes.items()
        }
        state = State(
            format=1,
            world_size=self.world.size,
            files=[written.file for written in of_ranks if written.file is not None],
            parameters=parameters,
            **pending.content,
        )
        partial, final = self.directory / f"{pending.name}{PARTIAL}", self.directory / pending.name
        try:
            write_file(partial / STATE_FILE, encode(state))
            remove(final)
            publish(partial, final)
            write_file(self.directory / POINTER_FILE, f"{pending.name}\n".encode())
            (self.directory / NONE_YET).unlink(missing_ok=True)
        except Exception as error:
            pending.written.problem = _sentence(error)

    def _remove(self, partial: Path) -> None:
        if self.world.is_first:
            remove(partial)


@dataclass
class _Pending:
    """The save in hand. of_ranks: once all have written. waited: seconds in which training stood still."""

    step: int
    content: dict[str, Any]
    written: _Written
    thread: threading.Thread
    started: float
    waited: float
    of_ranks: list[_Written] | None = None

    @property
    def name(self) -> str:
        return step_name(self.step)


def start_thread(work: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Start a thread, which does not keep the process from ending."""
    thread = threading.Thread(target=work, args=arguments, name="checkpoint", daemon=True)
    thread.start()
    return thread


def _live(fragments: list[Fragment]) -> dict[str, Tensor]:
    return {f"{each.name}|{kind}": tensor for each in fragments for kind, tensor in each.tensors.items()}


def _host_buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")


def _as_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def _bytes_needed(engine: Any) -> int:
    """Bytes of the whole checkpoint: three float32 numbers a value."""
    return 12 * sum(full_shape(parameter).numel() for parameter in engine.module.parameters()) + _SPARE_BYTES


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
