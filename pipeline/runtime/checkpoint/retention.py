"""Which checkpoint folders stay: those of another past are set aside, old and unfinished ones removed. First rank only."""

import os
import shutil
from pathlib import Path

from pipeline.config import CheckpointSettings
from pipeline.runtime.checkpoint.commit import PARTIAL, step_name
from pipeline.runtime.checkpoint.read import checkpoint_names

_ABANDONED, _ABANDONED_KEPT = "abandoned-", 3


def retire_later(directory: Path, name: str) -> None:
    """Rename checkpoints later than `name`, so that the newest folder is again the one that the run continues."""
    for later in checkpoint_names(directory):
        if later > name:
            shutil.rmtree(directory / f"{_ABANDONED}{later}", ignore_errors=True)
            os.replace(directory / later, directory / f"{_ABANDONED}{later}")
    for old in sorted(directory.glob(f"{_ABANDONED}*"), reverse=True)[_ABANDONED_KEPT:]:
        shutil.rmtree(old)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed job has begun to write."""
    for unfinished in directory.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(unfinished)


def prune(directory: Path, current: str, settings: CheckpointSettings, return_to: int | None) -> None:
    """Delete all but the newest `keep` checkpoints, every `keep_every`-th step's, and those that a rollback may need.

    return_to: the first step to which a rollback may have to return before the next save; None: there are no rollbacks. It
    loads the newest checkpoint that is no later, and rollbacks after it the ones that follow.
    """
    keep, every = settings.keep, settings.keep_every
    if keep is None:
        return
    names = checkpoint_names(directory)
    if return_to is not None:
        early = [name for name in names if name <= step_name(return_to)]
        keep = max(keep, len(names) - len(early[1:]))
    for name in names[keep:]:
        step = int(name.removeprefix("step-"))
        if name != current and not (every is not None and step % every == 0):
            shutil.rmtree(directory / name)
