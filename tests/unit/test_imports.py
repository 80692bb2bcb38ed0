"""Imports point one way: train -> {evaluate, micro_step} -> {model, weighting, data, runtime} -> config -> storage."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pipeline"
UNIT_TESTS = Path(__file__).parent

# What a room may import of the package. Of data, corpus and loading never meet; both stand on shards, and shards on what lies
# in `data` itself. Among the middle rooms: the model computes its losses with the weighting's functions and knows how a batch
# lays out its documents, the runtime carries models. `progress` lies at the bottom beside config, above nothing but the
# weighting (whose thresholds it predicts) and the windows of loss spikes, so that the runtime keeps what training counts and
# imports nothing above itself.
ALLOWED = {
    "storage": set(),
    "processes": set(),
    "setting_types": {"storage"},
    "other_names": set(),
    "data_settings": {"setting_types", "storage"},
    "rope_settings": {"setting_types"},
    "model_settings": {"rope_settings", "setting_types"},
    "config": {"data_settings", "model_settings", "setting_types", "storage"},
    "yaml_text": set(),
    "model_sizes": set(),
    "recipe_layers": {"config", "model", "model_sizes", "storage", "yaml_text"},
    "objective_checks": {"config"},
    "recipe": {
        "config",
        "data_settings",
        "objective_checks",
        "other_names",
        "recipe_layers",
        "rope_settings",
        "setting_types",
        "storage",
        "yaml_text",
    },
    "run_length": {"config", "data.shards", "derived", "model_sizes"},
    "schedule": {"config", "weighting"},
    "loss_spikes": set(),
    "progress": {"loss_spikes", "weighting"},
    "data": {"storage"},
    "data.corpus": {"data", "data.shards", "processes", "storage"},
    "data.shards": {"data", "storage"},
    "data.loading": {"data_settings", "data", "data.shards", "storage"},
    "weighting": set(),
    "model": {"config", "data.loading", "rope_settings", "setting_types", "storage", "weighting"},
    "runtime": {"config", "data_settings", "model", "processes", "progress", "setting_types", "storage", "weighting"},
    "slurm": {"runtime", "storage"},
    "benchmark": {
        "assembly",
        "config",
        "data",
        "data.corpus",
        "data.loading",
        "data.shards",
        "derived",
        "flops",
        "micro_step",
        "model",
        "option_parser",
        "planning",
        "progress",
        "run",
        "runtime",
        "storage",
        "train",
        "weighting",
    },
    "consumption": {"data_settings", "data", "data.loading"},
    "micro_step": {"config", "consumption", "data.loading", "model", "weighting"},
    "derived": {"config", "data.loading", "data.shards", "model", "runtime", "storage"},
    "model_checks": {"config", "data", "data.shards", "derived", "model"},
    "data_checks": {"config", "data", "data.loading", "data.shards", "derived", "model_checks", "storage"},
    "checks": {"config", "data.corpus", "data.loading", "data_checks", "derived", "model", "model_checks", "runtime"},
    "audit": {"data", "data.loading", "runtime", "storage"},
    "report": {"audit", "runtime", "storage"},
    "experiment": {
        "config",
        "data",
        "data.corpus",
        "data.loading",
        "data.shards",
        "derived",
        "flops",
        "model",
        "report",
        "runtime",
        "saved_model",
        "setting_types",
        "storage",
        "weighting",
        "yaml_text",
    },
    "evaluate": {"config", "consumption", "data", "data.loading", "micro_step", "runtime", "weighting"},
    "run": {"config", "consumption", "data.loading", "micro_step", "runtime", "weighting"},
    "samples": {"data.loading", "generation", "run", "runtime", "storage", "weighting"},
    "flops": {"config", "derived", "model"},
    "step_clock": set(),
    "time_left": set(),
    "passage": {"micro_step", "report", "run", "runtime", "samples", "schedule", "weighting"},
    "reporter": {
        "consumption",
        "data.loading",
        "evaluate",
        "flops",
        "passage",
        "progress",
        "report",
        "run",
        "runtime",
        "samples",
        "schedule",
        "step_clock",
    },
    "rank_checks": {"config", "progress", "run", "runtime", "weighting"},
    "rollback": {"config", "data.loading", "progress", "run", "runtime"},
    "train": {
        "config",
        "consumption",
        "data.loading",
        "evaluate",
        "micro_step",
        "progress",
        "rank_checks",
        "reporter",
        "rollback",
        "run",
        "runtime",
        "schedule",
        "weighting",
    },
    "saved_model": {"config", "data", "model", "runtime"},
    "model_card": {"model", "runtime", "saved_model", "storage"},
    "generation": {"data", "model", "model_options", "runtime", "saved_model"},
    "evaluate_model": {
        "config",
        "data",
        "data.loading",
        "data.shards",
        "evaluate",
        "failures",
        "generation",
        "micro_step",
        "model",
        "model_options",
        "runtime",
        "saved_model",
        "schedule",
        "time_left",
    },
    "export_model": {"data", "data.loading", "data.shards", "model", "model_card", "saved_model", "storage"},
    "model_options": {"option_parser", "options"},
    "failures": {"runtime", "storage"},
    "option_parser": {"config"},
    "options": {"config", "option_parser", "recipe", "storage"},
    "command_line": {
        "config",
        "data",
        "failures",
        "on_all_ranks",
        "option_parser",
        "options",
        "processes",
        "run_length",
        "runtime",
    },
    "on_all_ranks": {"assembly", "checks", "config", "data", "failures", "model", "planning", "run_length", "runtime"},
    "assembly": {"config", "data.loading", "data.shards", "derived", "micro_step", "run", "runtime"},
    "planning": {"checks", "config", "data.loading", "derived", "flops", "model", "runtime", "weighting"},
    "scoring": {
        "assembly",
        "data_checks",
        "config",
        "data",
        "data.loading",
        "data.shards",
        "derived",
        "model",
        "runtime",
        "storage",
        "time_left",
    },
    "dry_run": {"assembly", "config", "job", "planning", "progress", "run", "runtime", "train"},
    "job": {
        "assembly",
        "checks",
        "config",
        "data",
        "data.corpus",
        "data.loading",
        "derived",
        "model",
        "planning",
        "progress",
        "run",
        "runtime",
        "schedule",
        "storage",
        "train",
    },
}


def room_of(module: str) -> str:
    """The room of a module by its dotted name below the package: `data.shards` of `data.shards.manifest`."""
    first, *rest = module.split(".")
    within = f"{first}.{rest[0]}" if rest else ""
    return within if within in ALLOWED else first


def modules() -> Iterator[tuple[Path, str]]:
    """Each module and the room it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module != "__init__":
            yield path, room_of(module)


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, by their dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from pipeline.data import shards` imports a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way() -> None:
    """Each arrow is allowed, and each one allowed is there."""
    found: dict[str, set[str]] = {}
    for path, room in modules():
        rooms = {room_of(name.removeprefix("pipeline.")) for name in imported(path) if name.startswith("pipeline.")}
        assert rooms <= ALLOWED[room] | {room}, path
        found.setdefault(room, set()).update(rooms - {room})
    assert found == ALLOWED


def test_no_two_rooms_import_each_other() -> None:
    above = {room: set(allowed) for room, allowed in ALLOWED.items()}
    while bottom := [room for room, allowed in above.items() if not allowed]:
        above = {room: allowed - set(bottom) for room, allowed in above.items() if room not in bottom}
    assert not above


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {path.name for path, _ in modules() if any(name.split(".")[0] == "deepspeed" for name in imported(path))}
    assert importers == {"engine.py"}


def test_the_objective_is_plain_torch() -> None:
    foreign = {
        name.split(".")[0]
        for path, room in modules()
        if room == "weighting"
        for name in imported(path)
        if not name.startswith("pipeline.")
    }
    assert foreign <= {"torch", "math", "typing", "collections", "dataclasses", "hashlib"}


def test_unit_tests_import_nothing_of_the_integration_tests() -> None:
    for path in sorted(UNIT_TESTS.rglob("*.py")):
        assert not [name for name in imported(path) if name.startswith("tests.integration")], path
