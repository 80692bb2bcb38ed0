"""Load a checkpoint into an engine of any layout.

Every byte is verified before it counts. On the layout that wrote it each rank reads its own file once, hashing what it sets; on
another the ranks share the hashing and agree before any value is set. What is wrong is read a second time. What is wrong with a
checkpoint then is a sentence, the same on all ranks, and the next older one is tried.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.checkpoint.commit import rank_file
from pipeline.runtime.checkpoint.folders import OTHER_BYTES, problem_of, reason
from pipeline.runtime.checkpoint.fragment_file import FileError, Piece, read_header, read_pieces
from pipeline.runtime.checkpoint.fragments import FROZEN, Fragment, fragments_of, refresh_weights, set_optimizer_step
from pipeline.runtime.checkpoint.state import SavedParameter, State
from pipeline.runtime.distributed import World, gather_over_ranks
from pipeline.runtime.parameters import full_shape


def load(directory: Path, state: State, engine: Any, world: World) -> list[str]:
    """Load a checkpoint into an engine; collective. Returns what is wrong with it, on all ranks alike; then the engine's values
    are undefined, and another checkpoint must be loaded over them."""
    fragments = fragments_of(engine)
    problems = _problems_with_parameters(state, engine)
    if problems:
        return [f"{directory.name}: {problem}" for problem in problems]

    # The same layout: hash and values from one reading of the rank's own file.
    own = _reads_own_file_alone(fragments, state, world)
    same_layout = all(gather_over_ranks(own))
    if same_layout:
        found = _agree(_twice(_read_own, directory, state, fragments, world))
    else:
        found = _agree(_twice(_hash_share, directory, state, world))
        found = found or _agree(_twice(_read_parts, directory, state, fragments))
    if found:
        return [f"{directory.name}: {problem}" for problem in found]

    set_optimizer_step(engine, state.optimizer_step)
    refresh_weights(engine)
    return []


def _problems_with_parameters(state: State, engine: Any) -> list[str]:
    """Compare names, shapes and what is frozen. The same on all ranks, because all build the same model."""
    here = {
        name: (list(full_shape(parameter)), parameter.requires_grad) for name, parameter in engine.module.named_parameters()
    }
    there = {name: (saved.shape, saved.kinds != [FROZEN]) for name, saved in state.parameters.items()}
    return [
        f"{name}: saved {_described(there.get(name))}, this model's {_described(here.get(name))}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ][:5]


def _described(parameter: tuple[list[int], bool] | None) -> str:
    if parameter is None:
        return "is not there"
    shape, trained = parameter
    return f"is {shape}{'' if trained else ', frozen'}"


def _reads_own_file_alone(fragments: Sequence[Fragment], state: State, world: World) -> bool:
    """True if this rank's fragments are those of the file of its own number."""
    saved = {
        (name, first, count)
        for name, parameter in state.parameters.items()
        for file, first, count in parameter.fragments
        if file == world.rank
    }
    return state.world_size == world.size and saved == {(each.name, each.start, each.numel) for each in fragments}


def _twice(read: Callable[..., str | None], directory: Path, *arguments: Any) -> str | None:
    """Read again before a checkpoint is given up, and with it what was trained since the one before: a file system on the
    network may fail for a moment."""
    problem = read(directory, *arguments)
    if problem is not None:
        print(f"{directory.name}: {problem}; it is read again", flush=True)
        problem = read(directory, *arguments)
    return problem


def _read_own(directory: Path, state: State, fragments: Sequence[Fragment], world: World) -> str | None:
    path = directory / rank_file(world.rank)
    wanted = [(f"{each.name}|{kind}", 0, tensor) for each in fragments for kind, tensor in each.tensors.items()]
    try:
        sha256 = _read_into(path, wanted, hashed=True)
    except (OSError, FileError) as error:
        return f"{path.name}: {reason(error)}"
    return None if sha256 == state.files[world.rank].sha256 else f"{path.name}: {OTHER_BYTES}"


def _hash_share(directory: Path, state: State, world: World) -> str | None:
    """Verify this rank's share of the files: the largest files first, each to the rank with the fewest bytes so far."""
    loads = [0] * world.size
    for file in sorted(state.files, key=lambda file: (-file.bytes, file.name)):
        rank = loads.index(min(loads))
        loads[rank] += file.bytes
        problem = problem_of(directory, file) if rank == world.rank else None
        if problem is not None:
            return problem
    return None


def _read_parts(directory: Path, state: State, fragments: Sequence[Fragment]) -> str | None:
    """Read this rank's fragments out of whatever files hold them."""
    wanted: dict[int, list[tuple[str, int, Tensor]]] = defaultdict(list)
    for fragment in fragments:
        for file, skipped, first, count in _overlaps(state.parameters[fragment.name], fragment):
            for kind, tensor in fragment.tensors.items():
                wanted[file].append((f"{fragment.name}|{kind}", skipped, tensor.narrow(0, first - fragment.start, count)))

    for file, parts in wanted.items():
        path = directory / state.files[file].name
        try:
            _read_into(path, parts, hashed=False)
        except (OSError, FileError) as error:
            return f"{path.name}: {reason(error)}"
    return None


def _read_into(path: Path, wanted: Sequence[tuple[str, int, Tensor]], *, hashed: bool) -> str | None:
    """Read [name in the file, values of it to skip, where the following belong] from a file; returns as `read_pieces`."""
    entries = read_header(path)
    pieces, converted = [], []
    for name, skipped, target in wanted:
        entry = entries.get(name)
        if entry is None or entry.numel < skipped + target.numel():
            raise FileError(f"expected {skipped + target.numel()} values of {name}, got {entry.numel if entry else 0}")

        # Frozen parameters are saved in the model's dtype, which may be another now.
        held = target if entry.dtype == target.dtype else torch.empty_like(target, dtype=entry.dtype)
        if held is not target:
            converted.append((held, target))
        pieces.append(Piece(entry.offset + skipped * entry.dtype.itemsize, held))

    sha256 = read_pieces(path, pieces, hashed=hashed)
    for held, target in converted:
        target.copy_(held)
    return sha256


def _overlaps(saved: SavedParameter, fragment: Fragment) -> Iterator[tuple[int, int, int, int]]:
    """(file, values to skip in it, first value, number of values) of each saved part of a fragment."""
    for file, saved_first, saved_count in saved.fragments:
        first = max(saved_first, fragment.start)
        count = min(saved_first + saved_count, fragment.start + fragment.numel) - first
        if count > 0:
            yield file, first - saved_first, first, count


def _agree(problem: str | None) -> list[str]:
    """All ranks' problems; collective."""
    return list(dict.fromkeys(found for found in gather_over_ranks(problem) if found))
