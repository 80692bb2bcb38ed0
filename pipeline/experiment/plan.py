"""The plan of an experiment: what is run, at which rates and seeds, and what is decided by it.

It is written before the first run. The experiment's folder keeps a copy, and another plan is refused there, so that nothing is
changed once results are seen.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError, model_validator

from pipeline.config import ConfigError, Settings
from pipeline.experiment.corpus import Size
from pipeline.setting_types import NonNegative, Positive, PositiveFloat, Section, rule_of
from pipeline.storage.whole_file import write_file
from pipeline.yaml_text import parse_yaml

PLAN_FILE = "plan.json"

Sections = dict[str, dict[str, Any]]
"""Settings of a recipe, by section."""


class Arm(Section):
    """One arm: what it trains with in the place of what all share."""

    settings: Sections
    """Sections of a recipe."""
    clean_share: bool = False
    """k_percent is in each step the share of clean tokens."""
    filtered: bool = False
    """Train on the documents that the reference finds easiest, as many tokens as a selection of k_percent keeps."""


class Plan(Section):
    """Settings of an experiment: runs and decisions. A plan's file, the arms and the shared settings together."""

    decides: bool
    """False of a plan too small to decide anything."""
    corpus: Size
    """Sizes of the data."""
    base: Sections
    """Settings that every run shares."""
    steps: Positive
    """Optimizer steps of a run."""
    reference_steps: Positive
    """Optimizer steps of the references."""
    reference_learning_rate: PositiveFloat
    """Peak learning rate of the references."""
    timing_steps: Positive
    """Optimizer steps by which an arm's speed is measured."""
    validate_every: Positive
    """Steps between validations."""
    arms: dict[str, Arm]
    """All arms of stage one."""
    learning_rates: list[PositiveFloat]
    """Rates of stage one."""
    main_arms: list[str]
    """Arms of stage two."""
    seeds: list[NonNegative]
    """New seeds of stage two; stage one has seed 0."""
    primary: list[tuple[str, str]]
    """The comparisons that decide: pairs of main arms."""
    least_learned: float
    """Nats by which the last head of every main arm must lie below the unigram of the same rows, or nothing is decided."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Plan":
        unknown = [name for name in self.main_arms if name not in self.arms]
        unknown += [name for pair in self.primary for name in pair if name not in self.main_arms]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: expected arms of stage one, and in comparisons arms of stage two")
        if 0 in self.seeds or len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise ValueError(f"seeds: expected at least two different ones, none of them 0, stage one's; got {self.seeds}")
        return self


class RunName(NamedTuple):
    """A run: its arm, learning rate and seed."""

    arm: str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-rate-{self.learning_rate:g}-seed-{self.seed}"


def read_plan(file: Path) -> Plan:
    """Read a plan, with `arms.yaml` and `base.yaml` beside it.

    Raises:
        ConfigError: the plan has unknown keys or values out of range.
    """
    plan, arms, base = (_mapping(path) for path in (file, file.parent / "arms.yaml", file.parent / "base.yaml"))
    names = plan.get("arms")
    if not isinstance(names, list):
        raise ConfigError([f"{file}: arms: expected a list of names; got {names!r}"])
    unknown = [str(name) for name in names if str(name) not in arms]
    if unknown:
        raise ConfigError([f"{file}: {', '.join(unknown)}: no such arm in {file.parent / 'arms.yaml'}"])
    own = plan.pop("settings", {})
    try:
        found = Plan.model_validate(plan | {"base": _joined(file, base, own), "arms": {name: arms[name] for name in names}})
        # Before the folder keeps the plan: a recipe that is wrong is refused while it can be corrected.
        for run in stage_one(found):
            settings_of(found, run, file.parent)
    except ValidationError as error:
        raise ConfigError([f"{file}: {'.'.join(map(str, each['loc']))}: {rule_of(each)}" for each in error.errors()]) from None
    return found


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = parse_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{file} is not valid YAML: {error}"]) from None
    if not isinstance(found, dict):
        raise ConfigError([f"{file}: expected keys and values; got {type(found).__name__}"])
    return found


def _joined(file: Path, base: dict[str, Any], own: Any) -> Sections:
    parts = (base, own)
    if not all(isinstance(part, dict) and all(isinstance(values, dict) for values in part.values()) for part in parts):
        raise ConfigError([f"{file}: settings: expected sections of a recipe, as in {file.parent / 'base.yaml'}"])
    return joined(*parts)


def keep_plan(plan: Plan, directory: Path) -> None:
    """Write the plan into the experiment's folder, or check that it is the one that is there.

    Raises:
        ConfigError: the folder was begun with another plan.
    """
    content = (json.dumps(plan.model_dump(mode="json"), indent=1) + "\n").encode()
    file = directory / PLAN_FILE
    if file.is_file() and file.read_bytes() != content:
        raise ConfigError(
            [f"--output: {directory} was begun with another plan; a plan is not changed once it runs: name another"]
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_file(file, content)


def stage_one(plan: Plan) -> list[RunName]:
    """Every arm at every rate."""
    return [RunName(arm, rate, 0) for arm in plan.arms for rate in plan.learning_rates]


def stage_two(plan: Plan, best_rates: Mapping[str, float]) -> list[RunName]:
    """The main arms at their best rates, on new seeds."""
    return [RunName(arm, best_rates[arm], seed) for seed in plan.seeds for arm in plan.main_arms]


def settings_of(plan: Plan, run: RunName, directory: Path, k_percent: Sequence[tuple[int, float]] | None = None) -> Settings:
    """The settings of a run, as an ordinary recipe.

    k_percent: over time, of an arm of `clean_share`.
    """
    arm = plan.arms[run.arm]
    data = directory / "data"
    own: Sections = {
        "run": {"name": str(run)},
        "data": {
            "path": data / ("filtered" if arm.filtered else "corpus/mix"),
            "validation_path": {name: data / "corpus/validation" / name for name in ("manual", "code")},
            "seed": run.seed,
        },
        "model": {"seed": run.seed},
        "training": {"steps": plan.steps, "learning_rate": run.learning_rate},
        "logging": {"validation_every": plan.validate_every},
    }
    filled = _filled(arm.settings, output=str(directory), seed=str(run.seed))
    over_time = {} if k_percent is None else {"training": {"k_percent": [list(each) for each in k_percent]}}
    return Settings.model_validate(joined(plan.base, own, filled, over_time))


def joined(*parts: Mapping[str, Mapping[str, Any]]) -> Sections:
    """Settings in which later parts replace those of earlier ones."""
    found: Sections = {}
    for part in parts:
        for section, values in part.items():
            found[section] = found.get(section, {}) | dict(values)
    return found


def _filled(settings: Sections, **names: str) -> Sections:
    """Fill {output} and {seed} in. A number that came of it is one again."""

    def fill(value: Any) -> Any:
        return yaml.safe_load(value.format(**names)) if isinstance(value, str) and "{" in value else value

    return {section: {key: fill(value) for key, value in values.items()} for section, values in settings.items()}
