"""What a run directory says of itself: resolved settings, versions, commit, command; and the identity of what it was
trained on, by which a continuation is recognised."""

import hashlib
import json
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.config import DataSettings, Settings
from pipeline.runtime.checkpoint import replace_text
from pipeline.runtime.distributed import World
from pipeline.runtime.identity import flatten
from pipeline.storage.files import read_whole
from pipeline.storage.location import Place

PACKAGES = ("torch", "deepspeed", "webdataset", "tokenizers", "safetensors", "numpy")


def describe_run(run_dir: Path, settings: Settings, deepspeed: dict[str, Any], world: World, device: torch.device) -> None:
    """Write config.yaml and environment.json; `deepspeed` is the JSON's content as it was given."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.yaml", settings.to_yaml())
    environment = {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "host": socket.gethostname(),
        "ranks": world.size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads_per_rank": torch.get_num_threads(),
        "deepspeed_json": deepspeed,
    }
    replace_text(run_dir / "environment.json", json.dumps(environment, indent=1) + "\n")


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


def _git_commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _data_fingerprint(data: DataSettings) -> str | list[Any]:
    """Of the manifest; of a mixture, each set's name, weight and manifest."""

    def of(place: Place) -> str:
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
