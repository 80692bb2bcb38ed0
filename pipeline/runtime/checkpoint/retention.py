"""Which checkpoint folders stay: those of another past are set aside, old and unfinished ones removed. First rank only."""

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.config import CheckpointSettings
from pipeline.runtime.checkpoint.commit import remove
from pipeline.runtime.checkpoint.folders import ABANDONED, PARTIAL, saved_steps, step_name

_ABANDONED_KEPT = 3


def retire_later(directory: Path, step: int) -> None:
    """Rename checkpoints later than `step`, so that the newest folder is again the one that the run continues."""
    for later in saved_steps(directory):
        if later > step:
            abandoned = directory / f"{ABANDONED}{step_name(later)}"
            remove(abandoned)
            os.replace(directory / step_name(later), abandoned)
    remove_all(sorted(directory.glob(f"{ABANDONED}*"), reverse=True)[_ABANDONED_KEPT:])


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed job has begun to write, or to delete."""
    remove_all(directory.glob(f"step-*{PARTIAL}"))


def set_old_aside(directory: Path, current: int, settings: CheckpointSettings, return_to: int | None) -> list[Path]:
    """Rename all but the newest `keep` checkpoints, every `keep_every`-th step's, and those that a rollback may need.

    Renamed before they are removed, none is ever found half deleted.

    current: the step that was saved just now.
    return_to: the first step to which a rollback may have to return before the next save; None: there are no rollbacks. It
    loads the newest checkpoint that is no later, and rollbacks after it the ones that follow.

    Returns:
        The folders to remove.
    """
    keep, every = settings.keep, settings.keep_every
    if keep is None:
        return []
    steps = saved_steps(directory)
    if return_to is not None:
        early = [step for step in steps if step <= return_to]
        keep = max(keep, len(steps) - len(early[1:]))

    set_aside = []
    for step in steps[keep:]:
        if step != current and not (every is not None and step % every == 0):
            set_aside.append(directory / f"{step_name(step)}.deleted{PARTIAL}")
            os.replace(directory / step_name(step), set_aside[-1])
    return set_aside


def remove_all(folders: Iterable[Path]) -> None:
    """Remove folders. What cannot be removed now is removed when the run is started again."""
    for folder in folders:
        remove(folder)
