"""Peak memory of a stretch of work: the device's allocator on CUDA, the process's resident set on a CPU."""

import contextlib
import re
from pathlib import Path

import torch

MAX_REFERENCE_FRACTION = 0.25
"""The largest part of the free memory that `reference.sharding: auto` gives to a whole reference: the rest is activations'."""


def sharding_that_fits(reference_bytes: float, free_bytes: float) -> str:
    """`replicate` or `zero3`, by what a whole reference takes of what is free once the policy is built."""
    return "replicate" if reference_bytes <= MAX_REFERENCE_FRACTION * free_bytes else "zero3"


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where that is refused `peak_bytes` gives the peak since the process began: never too small.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Bytes at the highest point since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_bytes("VmHWM")


def current_bytes(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident_bytes("VmRSS")


def total_bytes() -> int | None:
    """Bytes of this machine's CUDA device; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def free_bytes(device: torch.device, local_size: int) -> float:
    """Bytes that this rank could still have: of a GPU, which is its own, all that is free; of this machine's memory its
    part among `local_size` ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024 / local_size


def _resident_bytes(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
