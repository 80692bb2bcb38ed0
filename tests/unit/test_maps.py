"""The maps of the code, in README and in the packages' docstrings, name exactly the folders and modules that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pipeline"
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)

# "train.py   the loop", "data/corpus/   rows from documents"
TREE_LINE = re.compile(r"^( *)([a-z_/]+(?:\.py|/)) {2,}(\S.*)$", re.MULTILINE)
# "writer   tars of packed rows" or "writer — tars of packed rows"
MODULE_LINE = re.compile(r"^ *([a-z][a-z0-9_]*)(?: {2,}| — )\S", re.MULTILINE)


def docstring(package: Path) -> str:
    return ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""


def modules(package: Path) -> set[str]:
    return {path.stem for path in package.glob("*.py")} - {"__init__"}


def package_tree() -> dict[str, str]:
    return {name: text for _, name, text in TREE_LINE.findall(docstring(PACKAGE))}


def readme_tree() -> list[tuple[str, str, str]]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Finding your way")[2]
    return TREE_LINE.findall(section.split("```")[1])


def test_the_package_names_every_room_and_every_top_level_module() -> None:
    rooms = {f"{room.relative_to(PACKAGE)}/" for room in ROOMS}
    assert set(package_tree()) == rooms | {f"{name}.py" for name in modules(PACKAGE)}


def test_the_readme_has_the_same_tree_as_the_package() -> None:
    assert {name: text for indent, name, text in readme_tree() if indent} == package_tree()


def test_the_readme_names_every_folder_of_the_repository() -> None:
    found = {
        f"{path.name}/" for path in ROOT.iterdir() if (path / "__init__.py").exists() or path.name in ("launch", "ds_configs")
    }
    assert {name for indent, name, _ in readme_tree() if not indent} == found


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE)))
def test_a_rooms_map_names_its_modules(room: Path) -> None:
    named = MODULE_LINE.findall(docstring(room))
    assert len(named) == len(set(named))
    rooms_within = {path.parent.name for path in room.glob("*/__init__.py")}
    # A room whose docstring describes its modules in sentences has no map to check.
    assert not named or modules(room) <= set(named) <= modules(room) | rooms_within
