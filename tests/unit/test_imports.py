"""Imports point one way: train -> {evaluate, micro_step} -> {model, weighting, data, runtime} -> config -> storage."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pipeline"
UNIT_TESTS = Path(__file__).parent

DATA = {"data", "data.corpus", "data.shards", "data.loading"}
# What a room may import of the package. Of data, corpus and loading never meet; both stand on shards, and shards on what lies
# in `data` itself. Among the middle rooms: the model computes its losses with the weighting's functions and knows how a batch
# lays out its documents, the runtime carries models. `progress` lies at the bottom beside config, above nothing but the
# weighting (whose thresholds it predicts), so that the runtime keeps what training counts and imports nothing above itself.
ALLOWED = {
    "storage": set(),
    "config": {"storage"},
    "recipe": {"config"},
    "schedule": {"config", "weighting"},
    "progress": {"weighting"},
    "data": set(),
    "data.corpus": {"data", "data.shards", "storage"},
    "data.shards": {"data", "config", "storage"},
    "data.loading": {"data", "data.shards", "config", "storage"},
    "weighting": {"config"},
    "model": {"config", "data.loading", "weighting"},
    "runtime": {"config", "storage", "progress", "weighting", "model"},
    "benchmark": DATA
    | {"config", "storage", "progress", "weighting", "model", "runtime", "micro_step", "evaluate", "run", "train", "assembly"},
    "consumption": {"config", "data", "data.loading"},
    "micro_step": {"config", "consumption", "data.loading", "weighting", "model"},
    "derived": {"config", "storage", "data.shards", "data.loading", "model", "runtime"},
    "checks": DATA | {"config", "storage", "derived", "model", "runtime"},
    "evaluate": {"config", "consumption", "data.loading", "weighting", "model", "runtime", "micro_step"},
    "run": {"config", "consumption", "data.loading", "weighting", "runtime", "micro_step"},
    "reporter": {"schedule", "config", "progress", "consumption", "data.loading", "runtime", "evaluate", "run"},
    "train": {
        "config",
        "schedule",
        "progress",
        "consumption",
        "data.loading",
        "weighting",
        "runtime",
        "micro_step",
        "run",
        "reporter",
    },
    "command_line": {"config", "recipe", "storage", "data", "model", "runtime", "checks", "train", "assembly", "job"},
    "assembly": {
        "config",
        "storage",
        "derived",
        "data.loading",
        "weighting",
        "model",
        "runtime",
        "micro_step",
        "checks",
        "run",
    },
    "planning": {"config", "derived", "model", "weighting", "runtime", "checks"},
    "scoring": {
        "config",
        "storage",
        "derived",
        "data",
        "data.shards",
        "data.loading",
        "model",
        "runtime",
        "checks",
        "assembly",
    },
    "job": DATA
    | {
        "planning",
        "config",
        "storage",
        "progress",
        "derived",
        "weighting",
        "model",
        "runtime",
        "micro_step",
        "evaluate",
        "checks",
        "run",
        "train",
        "assembly",
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
    assert {room for _, room in modules()} == set(ALLOWED)
    for path, room in modules():
        rooms = {room_of(name.removeprefix("pipeline.")) for name in imported(path) if name.startswith("pipeline.")}
        assert rooms <= ALLOWED[room] | {room}, path


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
