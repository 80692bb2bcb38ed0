"""Read a recipe (YAML) and `section.key=value` overrides into `Settings`, and report all problems at once.

An unknown key is refused with a suggestion. A refused value is replaced by its default, so that the rest can still be checked;
rules between settings that involve a refused value are skipped, because they would judge the default.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import ConfigError, MixtureSet, Settings, did_you_mean

TEMPERATURE_REMOVED = (
    "training.temperature: removed. Softmax weighting of excess losses gave way to an exact top-k selection; "
    "set training.k_percent (a fraction in (0, 1], default 0.6) instead"
)


def load_settings(recipe: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe, apply `section.key=value` overrides (values are YAML) and validate.

    Raises:
        ConfigError: naming every unknown key, malformed override and value out of range at once.
    """
    settings, problems = read_settings(recipe, overrides)
    if problems:
        raise ConfigError(problems)
    return settings


def read_settings(recipe: Path | None = None, overrides: Sequence[str] = ()) -> tuple[Settings, list[str]]:
    """Read the settings and return them with all problems, one sentence each. A refused value is replaced by its default.

    Raises:
        ConfigError: the recipe cannot be read at all.
    """
    values = _read_recipe(recipe) if recipe is not None else {}
    problems = [problem for override in overrides for problem in _apply_override(values, override)]
    problems += list(_removed_settings(values))
    refused: set[str] = set()
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        problems += [_message(detail) for detail in details]
        refused = {_dotted(detail["loc"][:2]) for detail in details}
        settings = Settings.model_validate(_without(values, refused))
    return settings, problems + [problem for keys, problem in _inconsistencies(settings) if refused.isdisjoint(keys)]


def _read_recipe(recipe: Path) -> dict[str, Any]:
    if not recipe.is_file():
        what = "expected a recipe, a YAML file, and this is a folder" if recipe.is_dir() else "no such file"
        raise ConfigError([f"--config: {what}: {recipe}"])
    try:
        values = yaml.load(recipe.read_text(encoding="utf-8"), _SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config: {recipe} is not valid YAML: {error}"]) from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(keys, dict | None) for keys in values.values()):
        raise ConfigError([f"--config: {recipe}: expected sections of keys ({', '.join(Settings.model_fields)})"])
    return {section: dict(keys or {}) for section, keys in values.items()}


class _SafeLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses duplicate keys; YAML forbids them, but the loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(map(str, twice))} given twice in one section", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _apply_override(values: dict[str, Any], override: str) -> Iterator[str]:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key):
        yield f"'{override}': expected section.key=value, for example training.steps=1000"
        return
    try:
        values.setdefault(section, {})[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        yield f"'{override}': the value is not valid YAML"


def _removed_settings(values: dict[str, Any]) -> Iterator[str]:
    if "temperature" in values.get("training", {}):
        del values["training"]["temperature"]
        yield TEMPERATURE_REMOVED


def _dotted(loc: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in loc)


def _without(values: dict[str, Any], refused: set[str]) -> dict[str, Any]:
    """`values` without the sections and `section.key`s in `refused`."""
    return {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in refused}
        for section, keys in values.items()
        if str(section) not in refused
    }


def _message(detail: Any) -> str:
    """One sentence for one of pydantic's errors."""
    key = _dotted(detail["loc"])
    if detail["type"] == "extra_forbidden":
        owner: Any = Settings
        for part in filter(lambda part: isinstance(part, str), detail["loc"][:-1]):
            owner = MixtureSet if part == "mixture" else owner.model_fields[part].annotation
        kind, name = "setting" if len(detail["loc"]) > 1 else "section", str(detail["loc"][-1])
        elsewhere = settings_named(name)
        return f"{key}: unknown {kind}; {did_you_mean(name, elsewhere or owner.model_fields)}"
    return f"{key}: got {detail['input']!r}; {detail['msg'].removeprefix('Value error, ')}"


def settings_named(name: str) -> list[str]:
    """`section.key` of every setting with this name, which may be given with or without its section."""
    names = [f"{section}.{key}" for section, field in Settings.model_fields.items() for key in field.annotation.model_fields]  # type: ignore[union-attr]
    return [known for known in names if name in (known, known.partition(".")[2])]


def _inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    """Problems between settings that are valid by themselves: (the settings involved, a sentence)."""
    yield from _model_inconsistencies(settings)
    yield from _head_inconsistencies(settings)
    yield from _source_inconsistencies(settings)


def _model_inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    model = settings.model
    width = {"model.dim", "model.num_attention_heads", "model.head_dim"}
    if model.head_dim is None and model.dim % model.num_attention_heads:
        yield width, f"model.dim: {model.dim} is not a multiple of num_attention_heads, {model.num_attention_heads}"
    elif (model.head_dim or model.dim // model.num_attention_heads) % 2:
        yield width, "model.head_dim: the width of an attention head is odd; rotary positions need it even"
    if model.num_key_value_heads and model.num_attention_heads % model.num_key_value_heads:
        yield (
            {"model.num_key_value_heads", "model.num_attention_heads"},
            f"model.num_key_value_heads: {model.num_key_value_heads} does not divide num_attention_heads, "
            f"{model.num_attention_heads}",
        )


def _head_inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    model, data, weights = settings.model, settings.data, settings.training.head_weights
    if data.sequence_length <= model.num_prediction_heads:
        yield (
            {"data.sequence_length", "model.num_prediction_heads"},
            f"data.sequence_length: {data.sequence_length} leaves head {model.num_prediction_heads - 1} nothing to "
            f"predict; expected more than model.num_prediction_heads, {model.num_prediction_heads}",
        )
    if weights is not None and len(weights) != model.num_prediction_heads:
        yield (
            {"training.head_weights", "model.num_prediction_heads"},
            f"training.head_weights: {len(weights)} weights for {model.num_prediction_heads} heads; give one a head",
        )
    if weights is not None and not any(weights):
        yield {"training.head_weights"}, "training.head_weights: all are zero, nothing would be trained"


def _source_inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    """Training data and reference must each have exactly one source."""
    data, reference = settings.data, settings.reference

    # Training data: a path, a mixture, or the built-in corpus.
    both = {"data.path", "data.builtin", "data.mixture"}
    if data.path is None and data.mixture is None and not data.builtin:
        yield both, "data.path: not set; name a directory of prepared shards (launch/prepare.py makes one)"
    if data.path is not None and data.builtin:
        yield both, "data.builtin: true and data.path is set; only one of them can be the training data"
    if data.mixture is not None and (data.path is not None or data.builtin):
        yield both, f"data.mixture: set, and so is data.{'builtin' if data.builtin else 'path'}; only one of them can be meant"
    names = [each.name for each in data.mixture or ()]
    if len(set(names)) != len(names):
        yield {"data.mixture"}, f"data.mixture: two sets have the same name; expected different ones, got {', '.join(names)}"

    # The reference: a path, cached losses, or training one. Only a selection by excess loss needs it.
    training = settings.training
    compares = settings.model.num_prediction_heads > 1 and training.k_percent < 1 and training.selection_score == "excess"
    if compares and reference.path is None and reference.training_steps is None and reference.cached is None:
        yield (
            {
                "reference.path",
                "reference.cached",
                "reference.training_steps",
                "model.num_prediction_heads",
                "training.k_percent",
                "training.selection_score",
            },
            "reference.path: not set; name the directory of a reference model, or set reference.training_steps to "
            "train one, or training.k_percent=1 to train without selection",
        )
    if reference.training_data is not None and reference.training_steps is None:
        yield (
            {"reference.training_data", "reference.training_steps"},
            "reference.training_data: set, but no reference is trained; set reference.training_steps as well, or remove it",
        )
    if reference.cached is not None and reference.training_steps is not None:
        yield set(), "reference.training_steps: set, and so is reference.cached; only one of them can be meant"
    if reference.path is not None and reference.training_steps is not None:
        yield set(), "reference.training_steps: set, and so is reference.path; only one of them can be meant"
    if reference.training_steps is not None and reference.horizon == "matched":
        yield (
            {"reference.training_steps", "reference.horizon"},
            "reference.horizon: 'matched' needs a reference with all heads, and reference.training_steps trains one with the "
            "next-token head alone; name one by reference.path, or set reference.horizon=shifted",
        )
    if reference.training_steps is not None and reference.training_data is None and not data.builtin:
        yield (
            {"reference.training_data", "data.builtin"},
            "reference.training_data: not set; name the prepared shards to train the reference on",
        )
