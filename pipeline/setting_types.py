"""The vocabulary in which `config` declares settings: value types, the rule for resuming, and the base of all sections.

A setting reads `name: Rule[Type] = default`, for example `steps: ChangesResult[Positive] = 1000`.
"""

import re
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    ValidationInfo,
    field_validator,
)

from pipeline.storage.location import Location, parse_location, user_path


def _directory_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name:
        raise ValueError("expected the name of a directory: no '/', no leading '.'")
    return name


def _one_or_named_locations(value: Any) -> Location | dict[str, Location]:
    if not isinstance(value, dict):
        return parse_location(value)
    wrong = [name for name in value if not (isinstance(name, str) and re.search(SET_NAME, name))]
    if wrong or not value:
        raise ValueError(
            f"expected NAME: FOLDER for each folder, names of letters, digits, '_', '.', '-'; got {wrong or value}"
        )
    return {name: parse_location(each) for name, each in value.items()}


def _as_text(value: Location | dict[str, Location]) -> str | dict[str, str]:
    return {name: str(each) for name, each in value.items()} if isinstance(value, dict) else str(value)


def _fraction(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("expected a fraction in (0, 1]")
    return value


_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _token_count(value: Any) -> Any:
    """Read `15B`, `1.5T`, `250_000` or `1e9` as a number of tokens."""
    matched = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?) ?([KMBT]?)", str(value), re.IGNORECASE)
    number = Decimal(matched[1]) * _THOUSANDS[matched[2].upper()] if matched else Decimal("0.5")
    if number != number.to_integral_value():
        raise ValueError("expected a number of tokens: 15B, 1.5T, 250M or 15000000000")
    return int(number)


def _first_and_last(steps: list[int]) -> list[int]:
    if len(steps) != 2 or steps[0] > steps[1]:
        raise ValueError("expected the first step and the last one, [10, 13]")
    return steps


class ResumeRule(Enum):
    """The rule for a setting that differs when a run is resumed.

    FREE: allowed, because the result stays the same. Folders may move; fingerprints of their contents are compared instead.
    CHANGES_RESULT: refused unless `--allow-changed` is given, because the rest of the run computes something else. It takes
    effect from the next step on.
    FIXED: always refused, because it could not take effect: the run's position in the data is counted in it, the weights have
    its shape, or it decides how they begin.
    """

    FREE = "free"
    CHANGES_RESULT = "changes the result"
    FIXED = "fixed"


SET_NAME = r"^[A-Za-z0-9_.\-]+$"
"""The form of a data set's name, which becomes a part of metrics' names."""

Value = TypeVar("Value")
Free = Annotated[Value, ResumeRule.FREE]
ChangesResult = Annotated[Value, ResumeRule.CHANGES_RESULT]
Fixed = Annotated[Value, ResumeRule.FIXED]

# No number that is counted is as large, and what computes with one has 64 bits for it.
Positive = Annotated[int, Field(gt=0, le=2**53)]
NonNegative = Annotated[int, Field(ge=0, le=2**53)]
TokenCount = Annotated[int, Field(gt=0, le=2**53), BeforeValidator(_token_count)]
"""A number of tokens, which may be written with K, M, B or T for thousands, millions …"""
# Beyond any model. So the values of a matrix, whose height may be a product of two sizes, still have a number in 64 bits.
Size = Annotated[int, Field(gt=0, le=2**20)]
StepRange = Annotated[list[Positive], AfterValidator(_first_and_last)]
"""The first and the last of some steps."""
DirectoryName = Annotated[str, AfterValidator(_directory_name)]
Fraction = Annotated[float, AfterValidator(_fraction)]
UserPath = Annotated[Path, AfterValidator(user_path)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

OneOrNamedLocations = Annotated[
    Location | dict[str, Location],
    PlainValidator(_one_or_named_locations),
    PlainSerializer(_as_text, return_type=str | dict[str, str], when_used="json"),
]
"""A location, or several by name."""

CONSTANT, OVER_TIME = "(constant)", "(over time)"
"""Marks of the two forms of a setting that may change over time; in the place of an error they stand beside the key."""


def _form_of_number(value: Any) -> str:
    return OVER_TIME if isinstance(value, list | tuple) else CONSTANT


def _form_of_list(value: Any) -> str:
    is_over_time = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], list | tuple)
    return OVER_TIME if is_over_time else CONSTANT


FractionOverTime = Annotated[
    Annotated[Fraction, Tag(CONSTANT)] | Annotated[list[tuple[NonNegative, Fraction]], Field(min_length=1), Tag(OVER_TIME)],
    Discriminator(_form_of_number),
]
"""A fraction, or `[[from_step, fraction], …]`."""
WeightsOverTime = Annotated[
    Annotated[list[NonNegativeFloat], Tag(CONSTANT)]
    | Annotated[list[tuple[NonNegative, list[NonNegativeFloat]]], Tag(OVER_TIME)],
    Discriminator(_form_of_list),
]
"""Weights, or `[[from_step, weights], …]`."""


_RULES = {
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "finite_number": "expected a number that is not infinite",
    "int": "expected a whole number",
    "float": "expected a number",
    "bool": "expected true or false",
    "string": "expected text; quote what YAML would read as something else",
    "literal": "expected {expected}",
    "enum": "expected {expected}",
    "list": "expected a list, [1, 2]",
    "tuple": "expected a pair, [from_step, value]",
    "too_long": "expected at most {max_length}",
    "too_short": "expected at least {min_length}",
    "path": "expected a path",
    "model": "expected keys and values",
    "dict": "expected keys and values",
    "invalid_key": "expected a word as the key",
    "string_pattern_mismatch": "expected only what {pattern} allows",
}


def rule_of(detail: Any) -> str:
    """Say in a few words what one of pydantic's errors (`ValidationError.errors()`) expected."""
    kind = str(detail["type"])
    rule = _RULES.get(kind) or _RULES.get(kind.partition("_")[0])
    # Bounds of floats are written as the whole numbers that they are.
    bounds = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in detail.get("ctx", {}).items()}
    return rule.format(**bounds) if rule else str(detail["msg"]).removeprefix("Value error, ")


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for other settings; pydantic would read them as 1 and 0."""
        if _holds_boolean(value) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("expected a value other than true and false (YAML reads yes, no, on and off so too; quote a name)")
        return value


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_boolean, value))
    return isinstance(value, bool)


class WandbSettings(Section):
    """Where a run's records go at Weights & Biases."""

    project: str
    """Project there."""
    entity: str | None = None
    """User or team; null: the default one of the login."""
