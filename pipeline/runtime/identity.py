"""What may not change between a run and its continuation: settings by their flat names, `section.key`, and by fingerprints the
data and the models that they name."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Change, DataSettings, Settings
from pipeline.storage.files import read_whole
from pipeline.storage.location import Location

# What a change of each setting means, as the setting itself says.
CHANGES = {
    f"{section}.{key}": change
    for section, values in Settings()
    for key, setting in type(values).model_fields.items()
    for change in setting.metadata
    if isinstance(change, Change)
}
# What the position of a run, one integer, is counted in.
FIXED = tuple(key for key, change in CHANGES.items() if change is Change.FIXED)


def differences_that_matter(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Settings (flat, `section.key`) that differ and change the result of a run, one sentence each."""
    keys = dict.fromkeys([*before, *after])
    return [
        f"{key}: was {before.get(key)!r}, is now {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key) and CHANGES.get(key) is not Change.FREE
    ]


def flatten(settings: Settings) -> dict[str, Any]:
    """`{"section.key": value}` with JSON values."""
    dumped = settings.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in dumped.items() for key, value in keys.items()}


def identity_of(settings: Settings, deepspeed: dict[str, Any], cached: Sequence[Any] = ()) -> dict[str, Any]:
    """What must be the same when a run continues: settings, data, reference (`cached`: the manifests of its cached losses,
    which in float32 are as good as itself), and what of the (resolved) DeepSpeed JSON decides how weights lie and in which
    precision they are."""
    reference = settings.reference.path
    fingerprint = model_fingerprint(reference) if reference is not None else None
    return flatten(settings) | {
        "data": _data_fingerprint(settings.data),
        "reference model": cached[0].reference_sha256 if cached else fingerprint,
        "reference losses": cached[0].dtype if cached else "float32",
        "deepspeed stage": deepspeed.get("zero_optimization", {}).get("stage", 0),
        "deepspeed bf16": deepspeed.get("bf16", {}).get("enabled", False),
        "deepspeed communication_data_type": deepspeed.get("communication_data_type"),
        "deepspeed grad_accum_dtype": deepspeed.get("data_types", {}).get("grad_accum_dtype"),
    }


def _data_fingerprint(data: DataSettings) -> str | list[Any]:
    """Of the manifest; of a mixture, each set's name, weight and manifest."""

    def of(place: Location) -> str:
        return hashlib.sha256(read_whole(place / "manifest.json", data.access)).hexdigest()

    if data.mixture is not None:
        return [[each.name, each.weight, of(each.path)] for each in data.mixture]
    assert data.path is not None
    return of(data.path)


def model_fingerprint(directory: Path) -> str:
    """Of a model's files: their sizes, and their first and last MiB. A whole hash of a large model takes minutes."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read())
    return digest.hexdigest()
