"""Record how a run was started in its run directory: resolved settings, versions, git commit, command."""

import json
import platform
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Settings
from pipeline.runtime.code_version import git_commit
from pipeline.runtime.distributed import World
from pipeline.storage.masking import masked_values
from pipeline.storage.whole_file import write_file

PACKAGES = ("torch", "deepspeed", "webdataset", "tokenizers", "safetensors", "numpy")


def describe_run(run_dir: Path, settings: Settings, deepspeed: dict[str, Any], world: World, device: torch.device) -> None:
    """Write config.yaml and environment.json. `deepspeed`: the JSON's content as given, before 'auto' is resolved."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(run_dir / "config.yaml", settings.to_yaml().encode())
    environment = {
        "command": masked_values(sys.argv),
        "git_commit": git_commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "host": socket.gethostname(),
        "ranks": world.size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads_per_rank": torch.get_num_threads(),
        "deterministic_kernels": torch.are_deterministic_algorithms_enabled(),
        "deepspeed_json": masked_values(deepspeed),
    }
    write_file(run_dir / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
