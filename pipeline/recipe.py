"""Read a recipe (YAML, with its bases) and `section.key=value` overrides into `Settings`, and report all problems at once.

An unknown key is refused with a suggestion, by what other trainers call it too. A refused value is replaced by its default, so
that the rest can still be checked; rules between settings that involve a refused value are skipped, since they would judge the
default.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import ConfigError, Settings, did_you_mean
from pipeline.data_settings import MixtureSet
from pipeline.objective_checks import objective_inconsistencies
from pipeline.other_names import ADVICE_ON, SETTING_OF
from pipeline.recipe_layers import BASE, Values, lay_over, read_recipe_file, take_shape_of_pretrained
from pipeline.rope_settings import ROPE_SCALINGS
from pipeline.setting_types import CONSTANT, OVER_TIME, rule_of
from pipeline.storage.masking import masked
from pipeline.yaml_text import parse_yaml

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


def read_settings(
    recipe: Path | None = None, overrides: Sequence[str] = (), is_known: bool = True
) -> tuple[Settings, list[str]]:
    """Read the settings and return them with all problems, one sentence each. A refused value is replaced by its default; of a
    recipe that cannot be read, all are. is_known: false if there is a recipe and its name was refused."""
    values, problems = read_recipe_file(recipe) if recipe is not None else ({}, [])
    is_read = is_known and not problems
    given: Values = {}
    problems += [problem for override in overrides for problem in _apply_override(given, override)]
    problems += lay_over(values, given)
    take_shape_of_pretrained(values)
    problems += list(_removed_settings(values))
    refused: set[str] = set()
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        problems += [_message(detail) for detail in details]
        refused = {_dotted(detail["loc"][:2]) for detail in details}
        settings = Settings.model_validate(_without(values, refused))
    inconsistencies = _inconsistencies(settings) if is_read else ()
    return settings, problems + [problem for keys, problem in inconsistencies if refused.isdisjoint(keys)]


def _apply_override(values: dict[str, Any], override: str) -> Iterator[str]:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key):
        meaning = meaning_of(name, text or "VALUE") or "for example training.steps=1000"
        yield f"'{_cut(masked(override))}': expected section.key=value; {meaning}"
        return
    try:
        values.setdefault(section, {})[key] = parse_yaml(text)
    except ValueError as error:
        problem = " ".join(masked(str(error)).split())
        yield f"'{_cut(masked(override))}': the value is not valid YAML: {problem}"


def _removed_settings(values: dict[str, Any]) -> Iterator[str]:
    if "temperature" in values.get("training", {}):
        del values["training"]["temperature"]
        yield TEMPERATURE_REMOVED


def _dotted(loc: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in loc if part not in (CONSTANT, OVER_TIME))


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
        kind = "setting" if len(detail["loc"]) > 1 else "section"
        return f"{key}: unknown {kind}; {_meant(detail)}"
    if detail["type"] == "missing":
        return f"{key}: not set; it must be"
    return f"{key}: got {_cut(masked(repr(detail['input'])))}; {masked(rule_of(detail))}"


def _meant(detail: Any) -> str:
    """The hint for an unknown section or key."""
    *path, name = map(str, detail["loc"])
    if "mixture" in path:
        return did_you_mean(name, MixtureSet.model_fields)
    if "rope_scaling" in path:
        return did_you_mean(name, ROPE_SCALINGS[path[-1]].model_fields)
    if not path:
        # A misspelt section, or another trainer's, whose keys may be known.
        keys = detail["input"] if isinstance(detail["input"], dict) else {}
        elsewhere = [setting for key in keys for setting in settings_meant(str(key))]
        known = [*Settings.model_fields, BASE]
        is_misspelt = difflib.get_close_matches(name, known)
        return did_you_mean(name, known) if is_misspelt or not elsewhere else _suggestion(elsewhere)

    # A setting of another section, what another trainer calls it, or a misspelt one.
    meant = settings_meant(name)
    if not meant and name.lower() in ADVICE_ON:
        return ADVICE_ON[name.lower()]
    own = type(getattr(Settings(), path[0])).model_fields
    close = [f"{path[0]}.{key}" for key in difflib.get_close_matches(name, own, n=1)]
    return _suggestion(meant or close) if meant or close else did_you_mean(name, own)


def _suggestion(settings: Sequence[str]) -> str:
    return f"did you mean {' or '.join(repr(setting) for setting in settings)}?"


def meaning_of(name: str, value: str = "VALUE") -> str | None:
    """Say what to write for a name that is no option or setting; None if that is not known.

    name: an option without its dashes, or a key with or without its section.
    """
    settings = settings_meant(name)
    if settings:
        return "write " + " or ".join(f"{setting}={value}" for setting in settings)
    return ADVICE_ON.get(_plain(name))


def settings_meant(name: str) -> list[str]:
    """`section.key` of the settings that have this name, with or without its section, or that other trainers call so."""
    whole = name.lower().replace("-", "_")
    theirs = SETTING_OF.get(_plain(name))
    return settings_named(whole) or settings_named(_plain(name)) or ([] if theirs is None else [theirs])


def _plain(name: str) -> str:
    """A name in our spelling, without its section."""
    return name.lower().replace("-", "_").rpartition(".")[2]


def settings_named(name: str) -> list[str]:
    """`section.key` of every setting with this name, which may be given with or without its section."""
    names = [f"{section}.{key}" for section, settings in Settings() for key in type(settings).model_fields]
    return [known for known in names if name in (known, known.partition(".")[2])]


def _cut(text: str) -> str:
    """A value's text, at most a line of it."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def _inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    """Problems between settings that are valid by themselves: (the settings involved, a sentence)."""
    yield from _model_inconsistencies(settings)
    yield from _head_inconsistencies(settings)
    yield from objective_inconsistencies(settings)
    yield from _data_inconsistencies(settings)
    yield from _reference_inconsistencies(settings)
    training = settings.training
    if training.rollback_on_spike is not None and training.rollback_skip_steps < training.rollback_steps:
        yield (
            {"training.rollback_on_spike", "training.rollback_steps", "training.rollback_skip_steps"},
            f"training.rollback_skip_steps: {training.rollback_skip_steps} steps do not reach the spike; expected at least "
            f"training.rollback_steps, {training.rollback_steps}",
        )
    data = settings.data
    if training.epochs is not None and (data.builtin or data.mixture is not None):
        what = (
            "the sets of a mixture have epochs of their own"
            if data.mixture is not None
            else "the built-in data is yet to be made"
        )
        yield (
            {"training.epochs", "data.mixture", "data.builtin"},
            f"training.epochs: counts those of data.path, and {what}; set training.steps or training.tokens",
        )


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
    model, data = settings.model, settings.data
    if data.sequence_length <= model.num_prediction_heads:
        yield (
            {"data.sequence_length", "model.num_prediction_heads"},
            f"data.sequence_length: {data.sequence_length} leaves head {model.num_prediction_heads - 1} nothing to "
            f"predict; expected more than model.num_prediction_heads, {model.num_prediction_heads}",
        )


def _data_inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    """The training data must have exactly one source: a path, a mixture, or the built-in corpus."""
    data = settings.data
    both = {"data.path", "data.builtin", "data.mixture"}
    if data.path is None and data.mixture is None and not data.builtin:
        yield both, "data.path: not set; name a directory of prepared shards (launch/prepare.py makes one)"
    if data.path is not None and data.builtin:
        yield (
            both,
            "data.builtin: true and data.path is set; only one of them can be the training data: write data.builtin=false",
        )
    if data.mixture is not None and (data.path is not None or data.builtin):
        yield both, f"data.mixture: set, and so is data.{'builtin' if data.builtin else 'path'}; only one of them can be meant"
    names = [each.name for each in data.mixture or ()]
    if len(set(names)) != len(names):
        yield {"data.mixture"}, f"data.mixture: two sets have the same name; expected different ones, got {', '.join(names)}"


def _reference_inconsistencies(settings: Settings) -> Iterator[tuple[set[str], str]]:
    """The reference must have exactly one source: a path, cached losses, or its training. Only a selection by excess loss
    needs one."""
    data, reference, training = settings.data, settings.reference, settings.training
    fractions = [each for _, each in training.k_percent] if isinstance(training.k_percent, list) else [training.k_percent]
    compares = settings.model.num_prediction_heads > 1 and min(fractions) < 1 and training.selection_score == "excess"
    compares = compares and reference.horizon != "own"
    if compares and reference.path is None and reference.training_steps is None and reference.cached is None:
        yield (
            {
                "reference.path",
                "reference.cached",
                "reference.training_steps",
                "model.num_prediction_heads",
                "training.k_percent",
                "training.selection_score",
                "reference.horizon",
            },
            "reference.path: not set; name the directory of a reference model, or set reference.training_steps to "
            "train one, reference.horizon=own to take the policy's head 0, or training.k_percent=1 to train without selection",
        )
    if reference.training_data is not None and reference.training_steps is None:
        yield (
            {"reference.training_data", "reference.training_steps"},
            "reference.training_data: set, but no reference is trained; set reference.training_steps as well, or remove it",
        )
    if reference.cached is not None and reference.training_steps is not None:
        yield (
            set(),
            (
                "reference.training_steps: set, and so is reference.cached; only one of them can be meant: "
                "write reference.training_steps=null, or reference.cached=null"
            ),
        )
    if reference.path is not None and reference.training_steps is not None:
        yield (
            set(),
            (
                "reference.training_steps: set, and so is reference.path; only one of them can be meant: "
                "write reference.training_steps=null, or reference.path=null"
            ),
        )
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
