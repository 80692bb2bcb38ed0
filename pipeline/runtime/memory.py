"""Measure memory: the allocator's on CUDA, the process's resident set on a CPU."""

import contextlib
import ctypes
import gc
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch

MAX_REFERENCE_FRACTION = 0.25
"""`reference.sharding: auto` replicates a reference up to this fraction of the free memory; activations need the rest."""
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def sharding_that_fits(reference_bytes: float, free_bytes: float) -> str:
    """Choose `replicate` or `zero3` by the memory that is free once the policy is built."""
    return "replicate" if reference_bytes <= MAX_REFERENCE_FRACTION * free_bytes else "zero3"


def reset_peak(device: torch.device) -> None:
    """Start measuring a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Containers may refuse this write; `peak_bytes` is then the peak since the process began, which is never too small.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_bytes("VmHWM")


def current_bytes(device: torch.device) -> int:
    """Memory in use now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident_bytes("VmRSS")


def give_back_freed() -> None:
    """Return to the system what was freed, of which a CPU's allocator keeps a part, so that what is resident is in use."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc has this function, other C libraries have not
        ctypes.CDLL(None).malloc_trim(0)


def total_bytes() -> int | None:
    """Memory of this machine's first CUDA device in bytes; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def device_name() -> str | None:
    """Name of this machine's first CUDA device; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def bytes_for_a_rank(device: torch.device, local_size: int) -> float:
    """Memory that a rank may plan with, in bytes: all of its GPU's, or its share of a half of the host's.

    It does not depend on what is in use now, so that every start of a job plans alike. The other half of a host is for what the
    plan does not count: libraries, loader processes, the system.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(_bytes_of_host("MemTotal"), _bytes_allowed_by_cgroups()) / 2 / local_size


def free_bytes(device: torch.device, local_size: int) -> float:
    """Memory that this rank could still allocate, in bytes: all that is free on its GPU, or its share of the host's.

    local_size: ranks on this machine, which share the host's memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_bytes_of_host("MemAvailable"), _bytes_left_by_cgroups()) / local_size


def _bytes_of_host(kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _bytes_left_by_cgroups(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float:
    """Memory that the limits of this process's control groups leave; infinite without one."""
    return max(0.0, min((limit - used for limit, used in _cgroup_limits(root, membership)), default=math.inf))


def _bytes_allowed_by_cgroups(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float:
    """The lowest limit of this process's control groups; infinite without one."""
    return min((limit for limit, _ in _cgroup_limits(root, membership)), default=math.inf)


def _cgroup_limits(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of this process's control groups, as Slurm and containers set them.

    The kernel gives up clean pages of files before it refuses memory, so these do not count as in use.
    """
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        *names, clean_pages = _CGROUP_FILES[controllers]
        top = root / controllers
        group = top / path.lstrip("/")
        # The limits of the groups above hold too. Inside a container the path may be one of the machine's, which is not there,
        # and the container's own group is what is mounted.
        for folder in (above for above in (group, *group.parents) if above.is_relative_to(top)):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in names)
                found = re.search(rf"^{clean_pages} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield limit, used - (int(found[1]) if found else 0)


_CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By version, 2 and 1: the files of the limit, which is `max` without one, and of what is used, in bytes, and the name in
`memory.stat` of what is used by clean pages."""


def _resident_bytes(kind: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
