"""The copy of the code that a job keeps in its run directory, `RUN/slurm/JOB/code`.

A job that is requeued outlives what its user does in the checkout. So the ranks run from a copy that the job makes when it
begins, and a requeued job finds the copy again. A new sbatch takes the checkout as it is then.

The recipe with its bases and the DeepSpeed JSON are copied too, wherever they lie: to `code/given/`, and their path below it.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.code_version import COMMIT_FILE, git_commit

_COPIED = ("launch", "pipeline", "ds_configs")
_FILE_OPTIONS = ("--config", "--deepspeed")
_GIVEN = "given"

_BASE = re.compile(
    r"""
    ^ (?P<key> (?P<quote>["']?) base (?P=quote) [ \t]* : (?:[ \t]*\n)? [ \t]+ )
    (?: "(?P<double>[^"\n]*)" | '(?P<single>[^'\n]*)' | (?P<plain>[^\s#"'].*?) )
    [ \t]* (?P<comment>[ \t]\#.*)? $
    """,
    re.MULTILINE | re.VERBOSE,
)
"""The line of a recipe that names its base. The batch script's python may have no package that reads YAML."""
_NULL = ("~", "null", "Null", "NULL")


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


def with_kept_files(arguments: Sequence[str], copy: Path) -> list[str]:
    """The command line with the recipe and the DeepSpeed JSON replaced by those of the copy, which are made if they are not
    there. A file that is neither here nor there stays as it is, and the script says so."""
    kept, option = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if option:
            kept.append(_kept_path(argument, option, copy))
        elif equals and name in _FILE_OPTIONS:
            kept.append(f"{name}={_kept_path(value, name, copy)}")
        else:
            kept.append(argument)
        option = argument if argument in _FILE_OPTIONS and not option else ""
    return kept


def _kept_path(path: str, option: str, copy: Path) -> str:
    file = Path(path).expanduser().absolute()
    kept = _place(file, copy)
    if file.is_relative_to(copy) or not (kept.exists() or file.is_file()):
        return path
    _keep(file, copy, option == "--config")
    return str(kept)


def _place(file: Path, copy: Path) -> Path:
    """The place of a file in the copy, by its name alone: links are not followed, which may lead elsewhere in the next life."""
    return copy / _GIVEN / os.path.normpath(file).lstrip("/")


def _keep(file: Path, copy: Path, is_recipe: bool) -> None:
    """Copy a file, and of a recipe before it the base, so that what is there is whole; without effect where it is."""
    kept = _place(file, copy)
    if kept.exists() or not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    base = _base_of(file, text) if is_recipe else None
    if base is not None:
        _keep(base, copy, is_recipe)
        # By a path that holds in the copy, also where it was given from the root or from a home.
        within = os.path.relpath(_place(base, copy), kept.parent)
        text = _BASE.sub(lambda found: f"{found['key']}{json.dumps(within, ensure_ascii=False)}{found['comment'] or ''}", text)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(partial, kept)


def _base_of(recipe: Path, text: str) -> Path | None:
    """The recipe that another one names as its base."""
    found = _BASE.search(text)
    named = found and (found["double"] or found["single"] or found["plain"])
    if not found or not named or found["plain"] in _NULL:
        return None
    return recipe.parent / Path(named).expanduser()
