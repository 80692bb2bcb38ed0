"""The identity of a run: what must not change when it is resumed.

It consists of the settings by their flat names (`section.key`), fingerprints of the data and models that they name, and the
parts of the DeepSpeed configuration that decide precision; how a run lies on ranks is none of it. Each setting's `ResumeRule`
says what a change means.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config import Settings
from pipeline.data_settings import DataSettings
from pipeline.runtime.model_content import ModelContent
from pipeline.setting_types import ResumeRule
from pipeline.storage.files import read_whole
from pipeline.storage.location import Location
from pipeline.storage.masking import masked_values

RESUME_RULES = {
    f"{section}.{key}": change
    for section, values in Settings()
    for key, setting in type(values).model_fields.items()
    for change in setting.metadata
    if isinstance(change, ResumeRule)
}
"""The rule of each setting by its flat name, collected from the annotations in `config`."""

FIXED_SETTINGS = tuple(key for key, change in RESUME_RULES.items() if change is ResumeRule.FIXED)
"""Settings that can never change: `ResumeRule.FIXED`."""


class Change(NamedTuple):
    """An entry of a run's identity that differs from the checkpoint's."""

    key: str
    before: Any
    after: Any
    details: str = ""

    @property
    def is_fixed(self) -> bool:
        """True if a run can never continue with this change. Pretrained weights may go, but others come too late."""
        return self.key in FIXED_SETTINGS or (self.key == "pretrained model" and self.after is not None)

    def __str__(self) -> str:
        return f"{self.key}: was {self.before!r}, is now {self.after!r}{self.details}"


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """List the entries of two identities that differ and change a run's result.

    An older program's identity lacks settings that it did not know: it ran with what is now their default. Secrets are compared
    masked: another password leads to the same data, which is compared by content.
    """
    before, after = masked_values(dict(before)), masked_values(dict(after))
    keys = dict.fromkeys([*before, *after])
    changes = [
        Change(
            key, before.get(key, _DEFAULTS.get(key)), after.get(key), _details(before.get(_parts(key)), after.get(_parts(key)))
        )
        for key in keys
        if not key.endswith(_PARTS)
    ]
    return [change for change in changes if change.before != change.after and not _may_change(change.key)]


def _parts(model: str) -> str:
    """The key of what is remembered of a model beside its fingerprint."""
    return f"{model}{_PARTS}"


def _details(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Say in what two models differ, if both are remembered; "" otherwise."""
    if not before or not after:
        return ""
    values = [f"config.json {key}: {was} → {now}" for key, was, now in _differing(before["config"], after["config"])]
    files = [
        f"{name} {'is new' if was is None else 'is gone' if now is None else 'has other bytes'}"
        for name, was, now in _differing(before["files"], after["files"])
        if name != "config.json" or not values
    ]
    said = [*values, *files]
    more = [f"and {len(said) - _MOST_DETAILS} more"] if len(said) > _MOST_DETAILS else []
    return f" ({'; '.join([*said[:_MOST_DETAILS], *more])})" if said else ""


def _differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[tuple[str, str | None, str | None]]:
    """(name, value before, value after) of each entry that differs; None where it is missing."""
    pairs = [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]
    return [(name, was, now) for name, was, now in pairs if was != now]


def _may_change(key: str) -> bool:
    """Return whether a setting is free to change; one that no longer exists is if it was a setting of a free section."""
    return RESUME_RULES.get(key) is ResumeRule.FREE or (key not in RESUME_RULES and key.startswith(_FREE_SECTIONS))


def flatten(settings: Settings) -> dict[str, Any]:
    """The settings as one flat dict, `{"section.key": value}`, with JSON values."""
    dumped = settings.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in dumped.items() for key, value in keys.items()}


def identity_of(
    settings: Settings,
    deepspeed: dict[str, Any],
    models: Mapping[str, ModelContent | None],
    cached: Sequence[Any] = (),
) -> dict[str, Any]:
    """Collect the identity that a resumed run must share: settings, data, models and precision.

    Args:
        deepspeed: the resolved DeepSpeed configuration.
        models: content of the `reference` and of the `pretrained` model; None of one that is not read.
        cached: manifests of the reference's cached losses, if any. In float32 they select exactly what the live reference
            does, so both have the same identity. Or manifests of external scores.
    """
    is_external = settings.training.selection_score == "external"
    losses = [] if is_external else cached
    sha256 = {name: None if content is None else content.sha256 for name, content in models.items()}
    parts = {
        _parts(f"{name} model"): {"files": content.files, "config": content.config}
        for name, content in models.items()
        if content is not None
    }
    return flatten(settings) | {
        "data": _data_fingerprint(settings.data),
        "reference model": losses[0].reference_sha256 if losses else sha256["reference"],
        "external scores": [each.reference_sha256 for each in cached] if is_external else None,
        "pretrained model": sha256["pretrained"],
        **parts,
        "reference losses": losses[0].dtype if losses else "float32",
        "deepspeed bf16": deepspeed.get("bf16", {}).get("enabled", False),
        "deepspeed communication_data_type": deepspeed.get("communication_data_type"),
        "deepspeed grad_accum_dtype": deepspeed.get("data_types", {}).get("grad_accum_dtype"),
    }


def _data_fingerprint(data: DataSettings) -> str | list[Any]:
    """SHA-256 of the data's manifest; for a mixture [name, weight, SHA-256] of each set."""

    def of(location: Location) -> str:
        return hashlib.sha256(read_whole(location / "manifest.json", data.access)).hexdigest()

    if data.mixture is not None:
        return [[each.name, each.weight, of(each.path)] for each in data.mixture]
    assert data.path is not None
    return of(data.path)


_DEFAULTS = flatten(Settings())
_PARTS = ", parts"
_MOST_DETAILS = 4
_FREE_SECTIONS = ("run.", "logging.", "checkpoint.")
