"""A check that ranks still hold the same state, run by all of them together at intervals.

Shapes: R ranks.
"""

import hashlib
from typing import Any

import torch
import torch.distributed as dist


class RanksDisagreeError(RuntimeError):
    """Ranks that must hold the same values do not: memory or communication is faulty, or the code is."""


def check_ranks_agree(values: dict[str, Any], device: torch.device) -> None:
    """Compare named values (anything with an exact `repr`) over ranks by their digests; one small gather.

    Raises:
        RanksDisagreeError: naming the values, and the ranks that differ from the most common digest.
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
