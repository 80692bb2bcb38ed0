"""Check that ranks still hold the same state, and agree on requests to stop; run by all of them together.

Shapes: R ranks.
"""

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from pipeline.runtime.distributed import any_rank
from pipeline.runtime.preemption import StoppedError, StopRequest


class RanksDisagreeError(RuntimeError):
    """Ranks hold different values where they must be equal: faulty memory, faulty communication, or a bug."""


def check_ranks_agree(values: dict[str, Any], device: torch.device) -> None:
    """Compare named values over ranks by 64-bit digests of their `repr`; one all-gather of 8 bytes per value.

    Raises:
        RanksDisagreeError: names the values that differ, and the ranks that differ from the most common digest.
    """
    own = [
        int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True) for value in values.values()
    ]
    gathered = [torch.empty(len(own), dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.tensor(own, dtype=torch.int64, device=device))
    problems = []
    for name, digests in zip(values, torch.stack(gathered, dim=1).tolist(), strict=True):
        common = max(digests, key=digests.count)
        others = [rank for rank, digest in enumerate(digests) if digest != common]
        if others:
            problems.append(f"{name}: rank(s) {', '.join(map(str, others))} differ from the others")
    if problems:
        raise RanksDisagreeError("ranks that must hold the same values do not: " + "; ".join(problems))


def end_if_signalled(stop: StopRequest, device: torch.device) -> None:
    """End the job where nothing has to be saved, if any rank has had a signal to stop; collective.

    Raises:
        StoppedError: on all ranks, if one has.
    """
    if any_rank(stop.is_signalled, device):
        raise StoppedError
