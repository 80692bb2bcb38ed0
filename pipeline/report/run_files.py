"""Read a run directory for a page about it.

Its files may be damaged, unfinished or absent: what is there is shown, and what is not is said.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.audit.history import History, read_history
from pipeline.audit.wall_clock import WallClock, wall_clock
from pipeline.report.errors import ReportError
from pipeline.runtime.events import OF_REFERENCE
from pipeline.storage.json_lines import read_json_lines
from pipeline.storage.masking import masked_values

_RUN_FILES = ("metrics.jsonl", "config.yaml", "events.jsonl")
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Content of a run directory.

    name: unique among the runs that were read together. training, validation: the records of metrics.jsonl. settings: by
    `section.name`, secrets masked. environment: of the newest start. notes: what is missing or damaged, a sentence each.
    """

    name: str
    path: Path
    training: list[Record]
    validation: list[Record]
    settings: dict[str, Any]
    environment: dict[str, Any]
    history: History
    clock: WallClock
    notes: list[str]

    @property
    def num_heads(self) -> int:
        return sum(f"loss_head_{head}" in self._all_keys for head in range(len(self._all_keys)))

    @property
    def sources(self) -> list[str]:
        """Names of the sources that the records know, in their order."""
        prefix = "selected_ratio_head_0_source_"
        return [key.removeprefix(prefix) for key in self._all_keys if key.startswith(prefix)]

    @property
    def sets(self) -> list[str]:
        """Names of the held-out sets; "" for an only one."""
        return list(dict.fromkeys(str(record.get("set", "")) for record in self.validation))

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in [*self.training, *self.validation]), default=0)

    @property
    def state(self) -> str:
        """Describe how the run stands, in a few words."""
        planned, how = self.settings.get("training.steps"), self.history.how_it_ended
        if self.history.exit_code == 0:
            return f"{how}, {self.last_step} steps"
        return f"{how}; step {self.last_step}" + (f" of {planned}" if planned else "")

    @property
    def _all_keys(self) -> dict[str, None]:
        last = [*self.validation[-1:], *self.training[-1:]]
        return {key: None for record in last for key in record}


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read several runs.

    Raises:
        ReportError: a path is no run directory, or no run has logged anything.
    """
    runs = [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    if not any(run.training or run.validation for run in runs):
        listed = "; ".join(str(run.path) for run in runs)
        raise ReportError(f"no step has been logged yet in {listed}: there is nothing to show. Let it run to its first step")
    return runs


def is_run(path: Path) -> bool:
    """Return whether a folder has anything of a run in it."""
    return any((path / file).is_file() for file in _RUN_FILES)


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """List each run directory, and of a folder that is none itself the run directories in it."""
    found = []
    for path in paths:
        within = [] if is_run(path) else [each for each in sorted(path.glob("*")) if is_run(each)]
        found += within or [path]
    return found


def read_run(path: Path, name: str) -> RunFiles:
    """Read one run directory; nothing in it is changed."""
    if not is_run(path):
        raise ReportError(f"{path}: expected a run directory, with {', '.join(_RUN_FILES[:-1])} or {_RUN_FILES[-1]}")
    records, notes = _records(path)
    history, of_reference = read_history(path), read_history(path / OF_REFERENCE)
    settings, problem = _settings(path)
    return RunFiles(
        name,
        path,
        [record for record in records if "split" not in record],
        [record for record in records if record.get("split") == "validation"],
        settings,
        _environment(path),
        history,
        wall_clock(history, of_reference.events),
        [*notes, *problem, *history.problems, *history.notes],
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest last parts of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError(f"the same run is named twice: {', '.join(map(str, paths))}")


def _records(path: Path) -> tuple[list[Record], list[str]]:
    lines = read_json_lines(path / "metrics.jsonl")
    whole = [line.value for line in lines if line.value is not None and _is_record(line.value)]
    damaged = len(lines) - len(whole)
    notes = [f"metrics.jsonl: {damaged} damaged line(s) left out"] if damaged else []
    return whole, notes if whole else [*notes, "metrics.jsonl: no step has been logged"]


def _is_record(values: Record) -> bool:
    """True of what has a step, and no number that nothing can be drawn of."""
    whole = [value for value in values.values() if isinstance(value, int)]
    return type(values.get("step")) is int and values["step"] >= 0 and all(abs(value) < 2**63 for value in whole)


def _settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(settings by `section.name`, problems)."""
    try:
        sections = yaml.safe_load((path / "config.yaml").read_bytes())
        settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    except FileNotFoundError:
        return {}, ["config.yaml: there is none, so settings are not known"]
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        return {}, [f"config.yaml: damaged, so settings are not known ({type(error).__name__})"]
    return masked_values(settings), []


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = json.loads((path / "environment.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return masked_values(values) if isinstance(values, dict) else {}
