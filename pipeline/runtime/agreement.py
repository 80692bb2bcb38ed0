"""What ranks say of themselves and one another: who met a number that was not finite, and whether all are still in the
same state. Both run on every rank together, the first only after a step that all discarded, the second at intervals.

Shapes: B rows, H heads, R ranks.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RanksDisagreeError(RuntimeError):
    """Ranks that must hold the same values do not: memory or communication is faulty, or the code is."""


def who_met_bad_numbers(bad_rows: Sequence[Tensor], bad_gradient_rows: Sequence[Tensor], keys: Sequence[Sequence[str]]) -> str:
    """A sentence that names ranks, heads and samples; where every loss was finite, whose gradient was not.

    Args:
        bad_rows: for each micro-batch of this rank bool [B, H], where a loss was not finite.
        bad_gradient_rows: for each micro-batch bool [B], where the gradient was not.
        keys: for each micro-batch the samples of its rows.
    """
    heads: dict[str, list[str]] = {}
    gradient: dict[str, list[str]] = {}
    for bad_BH, bad_B, samples in zip(bad_rows, bad_gradient_rows, keys, strict=True):
        for row, head in bad_BH.nonzero().tolist():
            heads.setdefault(f"head {head}", []).append(samples[row])
        for (row,) in bad_B.nonzero().tolist():
            gradient.setdefault("gradient", []).append(samples[row])
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (heads, gradient))
    # After a loss that was not finite every rank's gradient is spoilt on purpose.
    for found in zip(*by_rank, strict=True):
        sentences = [
            f"rank {rank}, {where}: {', '.join(samples[:4])}{' …' if len(samples) > 4 else ''}"
            for rank, of_rank in enumerate(found)
            for where, samples in sorted(of_rank.items())
        ]
        if sentences:
            return "; ".join(sentences)
    return "the gradient of all ranks together (each rank's own was finite)"


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
