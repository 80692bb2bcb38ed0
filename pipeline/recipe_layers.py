"""Read a recipe with the recipes that it is based on, and lay them over each other.

`base: other.yaml` in a recipe names another one, by a path from the folder of the recipe. What the recipe sets replaces the
base's, setting by setting (a list or a mapping is replaced as a whole), and a base may have one of its own. The command line is
the last layer.

Two things of a layer replace several settings below it: `model.size` sets the whole shape, of which the same layer may name
some values, and `training.steps`, `training.tokens` and `training.epochs` each replace the other two.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.model_sizes import MODEL_SIZES
from pipeline.storage.masking import masked
from pipeline.yaml_text import parse_yaml

Values = dict[str, dict[str, Any]]
"""Settings as a layer gives them: {section: {key: value}}."""

BASE = "base"
LENGTHS = ("steps", "tokens", "epochs")
"""The settings of section `training` of which one gives the length of a run."""

_NOT_OF_THE_SHAPE = {"size", "vocab_size", "num_prediction_heads", "seed", "pretrained", "new_heads"}
"""Settings of section `model` that a pretrained model's folder does not decide."""


def read_recipe_file(recipe: Path) -> tuple[Values, list[str]]:
    """Read a recipe and its bases; returns the settings that they give together, and all problems, a sentence each."""
    layers: list[Values] = []
    files: list[Path] = []
    file: Path | None = recipe
    while file is not None:
        read, problem = _read_file(file)
        if problem is not None:
            return {}, [f"--config: {_path_of_bases([*files, file])}{problem}"]
        files.append(file)
        layers.append({section: dict(keys or {}) for section, keys in read.items() if section != BASE})

        # Its base, by a path from its own folder.
        file, problem = _base_of(file, read.get(BASE))
        if file is not None and file.resolve() in [each.resolve() for each in files]:
            problem = f": {BASE}: goes round in a circle, back to {file}; remove one of these lines"
        if problem is not None:
            return {}, [f"--config: {_path_of_bases(files)}{files[-1]}{problem}"]

    values: Values = {}
    problems = [problem for layer in reversed(layers) for problem in lay_over(values, layer)]
    return values, problems


def lay_over(values: Values, layer: Values) -> Iterator[str]:
    """Replace settings in `values` by those of a layer; yields the problems within it."""
    for section, keys in layer.items():
        below = values.setdefault(section, {})
        if section == "model":
            keys = _shape_of(keys.get("size")) | keys
        if section == "training":
            given = [key for key in LENGTHS if keys.get(key) is not None]
            if len(given) > 1:
                named = " and ".join(f"training.{key}" for key in given)
                yield f"training.{given[0]}: {named} are set; expected exactly one of them, which gives the run's length"
            if given:
                # An emptied one beside another has nothing to say.
                keys = {key: value for key, value in keys.items() if key not in LENGTHS or value is not None}
                for key in LENGTHS:
                    below.pop(key, None)
        below.update(keys)


def _shape_of(size: Any) -> dict[str, Any]:
    """The settings of a size; nothing for what is none, which is refused by its own rule."""
    return dict(MODEL_SIZES.get(size, {})) if isinstance(size, str) else {}


def take_shape_of_pretrained(values: Values) -> None:
    """Take what is not given of the model's shape from the folder that `model.pretrained` names. A folder that cannot be read
    is left to the checks before the start, which name it."""
    model = values.get("model", {})
    if not isinstance(folder := model.get("pretrained"), str):
        return

    # torch takes seconds to load, and few recipes need it for being read.
    from safetensors import SafetensorError

    from pipeline.model.layout import described_settings
    from pipeline.model.model_config import ModelFilesError

    try:
        found = described_settings(Path(folder).expanduser()).model_dump(exclude=_NOT_OF_THE_SHAPE)
    except (ModelFilesError, SafetensorError, OSError):
        return
    model.update({key: value for key, value in found.items() if key not in model})


def _path_of_bases(files: list[Path]) -> str:
    """Say by which recipes one came to the last of these."""
    return "".join(f"{file}: {BASE}: " for file in files[:-1])


def _read_file(recipe: Path) -> tuple[dict[str, Any], str | None]:
    """(the sections of a recipe, and what is wrong with it, to be read after what it is)."""
    if not recipe.is_file():
        other = "a folder" if recipe.is_dir() else "no regular file"
        what = f"expected a recipe, a YAML file, and this is {other}" if recipe.exists() else "no such file"
        near = "" if recipe.exists() else _near(recipe)
        return {}, f"{what}: {recipe}{near}"
    try:
        values = parse_yaml(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, f"{recipe} cannot be read: {error.strerror}"
    except ValueError as error:
        return {}, f"{recipe} is not valid YAML: {masked(str(error))}"
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(keys, dict | None) for key, keys in values.items() if key != BASE):
        return {}, f"{recipe}: expected sections of keys ({', '.join(Settings.model_fields)})"
    return values, None


def _near(recipe: Path) -> str:
    """The hint for a recipe that is not there: one beside it that is called almost the same."""
    beside = [path.name for path in recipe.parent.glob("*.y*ml")] if recipe.parent.is_dir() else []
    close = difflib.get_close_matches(recipe.name, beside, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _base_of(recipe: Path, base: Any) -> tuple[Path | None, str | None]:
    """(the recipe that another one names as its base, and what is wrong with the name)."""
    if base is None:
        return None, None
    if not isinstance(base, str) or not base:
        return None, f": {BASE}: got {masked(repr(base))}; expected the path of a recipe, from this one's folder"
    return recipe.parent / Path(base).expanduser(), None
