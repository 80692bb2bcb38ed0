"""The folders of checkpoints: which ones there are, and whether their bytes are those that were written.

It does without torch, so that what only looks at checkpoints starts at once.
"""

import hashlib
from pathlib import Path

from pipeline.runtime.checkpoint.state import STATE_FILE, SavedFile, State, StateError, read_state

PARTIAL, ABANDONED = ".partial", "abandoned-"
OTHER_BYTES = "its bytes are not those that were written (SHA-256)"


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint: `step-00000100`."""
    return f"step-{step:08d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps of all checkpoint folders, newest first, sound or not; unfinished ones, and copies a user has made, left out."""
    digits = [path.name.removeprefix("step-") for path in directory.glob("step-*")]
    steps = [int(number) for number in digits if number.isdecimal()]
    return sorted((step for step in steps if (directory / step_name(step)).exists()), reverse=True)


def read_state_of(directory: Path) -> tuple[State | None, str]:
    """(state, "") of a checkpoint folder, or (None, what is wrong with it)."""
    try:
        state = read_state(directory / STATE_FILE)
    except StateError as error:
        return None, f"{directory.name}: {STATE_FILE}: {error}"
    if directory.name.removeprefix(ABANDONED) != step_name(state.step):
        return None, f"{directory.name}: {STATE_FILE}: is of step {state.step}"
    for file in state.files:
        try:
            size = (directory / file.name).stat().st_size
        except OSError as error:
            return None, f"{directory.name}: {file.name}: cannot be read ({error.strerror})"
        if size != file.bytes:
            return None, f"{directory.name}: {file.name}: expected {file.bytes} bytes, got {size}"
    return state, ""


def problem_of(directory: Path, file: SavedFile) -> str | None:
    """Read all of a file of a checkpoint; returns what is wrong with it."""
    try:
        with (directory / file.name).open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return f"{file.name}: {reason(error)}"
    return None if sha256 == file.sha256 else f"{file.name}: {OTHER_BYTES}"


def reason(error: Exception) -> str:
    """Say why a file could not be read."""
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) and error.strerror else str(error)
