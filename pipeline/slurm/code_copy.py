"""The copy of the code that a job keeps in its run directory, `RUN/slurm/JOB/code`.

A job that is requeued outlives what its user does in the checkout. So the ranks run from a copy that the job makes when it
begins, recipes and DeepSpeed JSONs included, and a requeued job finds the copy again. A new sbatch takes the checkout as it is
then.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.code_version import COMMIT_FILE, git_commit

_COPIED = ("launch", "pipeline", "ds_configs")
_FILE_OPTIONS = ("--config", "--deepspeed")


def keep_code(checkout: Path, copy: Path) -> None:
    """Copy the code to `copy`, which appears when it is complete; without effect where it exists."""
    if copy.exists():
        return
    partial = copy.with_name(f"{copy.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _COPIED:
        shutil.copytree(checkout / name, partial / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The copy is no git repository, or lies in one that may be another version by the time it is asked.
    (partial / COMMIT_FILE).write_text(git_commit(checkout) or "", encoding="utf-8")
    os.replace(partial, copy)


def with_kept_files(arguments: Sequence[str], checkout: Path, copy: Path) -> list[str]:
    """The command line with the recipe and the DeepSpeed JSON of the checkout replaced by those of the copy."""
    kept, option = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if option:
            kept.append(_kept(argument, checkout, copy))
        elif equals and name in _FILE_OPTIONS:
            kept.append(f"{name}={_kept(value, checkout, copy)}")
        else:
            kept.append(argument)
        option = argument if argument in _FILE_OPTIONS and not option else ""
    return kept


def _kept(path: str, checkout: Path, copy: Path) -> str:
    file = Path(path).expanduser().absolute()
    if file.is_relative_to(copy) or not file.is_relative_to(checkout.absolute()):
        return path
    kept = copy / file.relative_to(checkout.absolute())
    if not kept.exists():
        if not file.is_file():
            return path  # the script says so
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, kept)
    return str(kept)
