"""Imports point one way: train -> {evaluate, micro_step} -> {model, weighting, data, runtime} -> config -> storage."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pipeline"

# What a room may import of the package. Among the middle rooms: the model computes its losses with the weighting's
# functions and knows how a batch lays out its documents, the runtime carries models.
ALLOWED = {
    "storage": set(),
    "config": {"storage"},
    "recipe": {"config"},
    "data": {"config", "storage"},
    "weighting": {"config"},
    "model": {"config", "data", "weighting"},
    "runtime": {"config", "storage", "weighting", "model"},
    "benchmark": {
        "config",
        "storage",
        "data",
        "weighting",
        "model",
        "runtime",
        "micro_step",
        "evaluate",
        "run",
        "train",
        "assembly",
    },
    "micro_step": {"config", "data", "weighting", "model"},
    "checks": {"config", "storage", "data", "model", "runtime"},
    "evaluate": {"config", "data", "weighting", "model", "runtime", "micro_step"},
    "run": {"config", "data", "weighting", "runtime", "micro_step"},
    "reporter": {"config", "data", "runtime", "evaluate", "run"},
    "train": {"config", "data", "weighting", "runtime", "micro_step", "run", "reporter"},
    "command_line": {"config", "recipe", "storage", "data", "model", "runtime", "checks", "train", "assembly", "job"},
    "assembly": {"config", "storage", "data", "weighting", "model", "runtime", "micro_step", "checks", "run"},
    "planning": {"config", "model", "weighting", "runtime", "checks"},
    "scoring": {"config", "storage", "data", "model", "runtime", "checks", "assembly"},
    "job": {
        "planning",
        "config",
        "storage",
        "data",
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


def modules() -> Iterator[tuple[Path, str]]:
    """Each module and the room it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room != "__init__":
            yield path, room


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def test_imports_point_one_way() -> None:
    assert {room for _, room in modules()} == set(ALLOWED)
    for path, room in modules():
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}
        assert rooms <= ALLOWED[room] | {room}, path


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
