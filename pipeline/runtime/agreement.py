"""Cross-rank diagnostics: locate the non-finite numbers of a discarded step, and check that ranks have not diverged.

Both functions are collective: every rank calls them together, the first only after a step that all ranks discarded, the
second at intervals.

Shapes: B rows, H heads.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RanksDisagreeError(RuntimeError):
    """Ranks hold different values where they must be equal: faulty memory, faulty communication, or a bug."""


def who_met_bad_numbers(bad_rows: Sequence[Tensor], bad_gradient_rows: Sequence[Tensor], keys: Sequence[Sequence[str]]) -> str:
    """Name the ranks, heads and samples whose losses were not finite, in one sentence; collective.

    If every loss was finite, name the ranks and samples whose gradients were not.

    Args:
        bad_rows: one bool [B, H] per micro-batch of this rank, True where the loss was not finite.
        bad_gradient_rows: one bool [B] per micro-batch, True where the gradient was not finite.
        keys: the sample keys of each micro-batch's rows.
    """
    # The samples of this rank, by head and for the gradient.
    heads: dict[str, list[str]] = {}
    gradient: dict[str, list[str]] = {}
    for bad_BH, bad_B, samples in zip(bad_rows, bad_gradient_rows, keys, strict=True):
        for row, head in bad_BH.nonzero().tolist():
            heads.setdefault(f"head {head}", []).append(samples[row])
        for (row,) in bad_B.nonzero().tolist():
            gradient.setdefault("gradient", []).append(samples[row])

    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (heads, gradient))

    # Losses first: after a non-finite loss every rank's gradient is set to NaN on purpose, so gradients say nothing then.
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
