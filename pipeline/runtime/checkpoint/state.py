"""The file `state.json` of a checkpoint: what the other files hold, where a run stands, and what it may be continued with.

It is written last, so a folder without it is no checkpoint. Its last key is the SHA-256 of all before it, and it is read only
in the very form in which it is written, so that no flipped bit goes unnoticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

FORMAT = 1
STATE_FILE = "state.json"


Kind = Literal["master", "exp_avg", "exp_avg_sq", "frozen"]


class StateError(ValueError):
    """A state.json that cannot be used; the message says why, without its place."""


class SavedFile(BaseModel):
    """One rank's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # The name is a plain one: no state.json leads out of its folder.
    name: Annotated[str, Field(pattern=r"^rank-\d{5,}\.safetensors$")]
    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SavedParameter(BaseModel):
    """One parameter: its whole shape, and where its values lie.

    kinds: the tensors kept of it: `master`, `exp_avg`, `exp_avg_sq`, or `frozen`. fragments: [file, first value, number of
    values], in order, which together are the whole flattened parameter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: list[PositiveInt]
    kinds: list[Kind]
    fragments: list[Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]]


class HeldOut(BaseModel):
    """Each head's loss of one fixed batch. batch: the SHA-256 of its tokens. losses: empty where there is no such batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    batch: str = ""
    losses: list[float] = []


class State(BaseModel):
    """The content of `state.json`.

    world_size: ranks of the job that wrote it. progress: `Progress.to_json`. identity: `identity.identity_of`. optimizer_step:
    updates that the optimizer has counted. held_out: losses that a forward had of the saved weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    world_size: PositiveInt
    progress: dict[str, Any]
    identity: dict[str, Any]
    optimizer_step: NonNegativeInt
    held_out: HeldOut
    files: list[SavedFile]
    parameters: dict[str, SavedParameter]

    @property
    def step(self) -> int:
        return self.progress["step"]

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def encode(state: State) -> bytes:
    """The bytes of `state.json`."""
    content = state.model_dump(mode="json")
    return _canonical(content | {"sha256": hashlib.sha256(_canonical(content)).hexdigest()})


def read_state(path: Path) -> State:
    """Read a `state.json`.

    Raises:
        StateError: it is missing, damaged, of another format, or not one of ours.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise StateError("it has none, so it was never finished") from None
    except OSError as error:
        raise StateError(f"it cannot be read ({error.strerror})") from error
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StateError(f"it is damaged: no JSON ({error})") from error

    if not isinstance(content, dict):
        raise StateError(f"expected a JSON object, got a {type(content).__name__}")
    version = content.get("format")
    if version is None and "world_size" in content and "files" not in content:
        raise StateError("written by a former version of this program, whose checkpoints only that version reads")
    if isinstance(version, int) and version > FORMAT:
        raise StateError(f"format {version} is newer than this program, which reads {FORMAT}; update the program")

    digest = content.pop("sha256", None)
    if digest != hashlib.sha256(_canonical(content)).hexdigest() or raw != _canonical(content | {"sha256": digest}):
        raise StateError("it is damaged: its checksum does not fit its content")
    try:
        state = State.model_validate_json(_canonical(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise StateError(f"unexpected content: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    _check_cover(state)
    return state


def _check_cover(state: State) -> None:
    """Check that each parameter's fragments are all of it, once."""
    if not isinstance(state.progress.get("step"), int):
        raise StateError("unexpected content: progress.step is no integer")
    for name, parameter in state.parameters.items():
        numel, end = 1, 0
        for size in parameter.shape:
            numel *= size
        for file, first, count in parameter.fragments:
            if file >= len(state.files) or first != end or count == 0:
                raise StateError(f"unexpected content: fragments of {name} are not the whole of it, once")
            end += count
        if end != numel:
            raise StateError(f"unexpected content: fragments of {name} hold {end} of its {numel} values")


def _canonical(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=True).encode()
