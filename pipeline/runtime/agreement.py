"""Check that ranks still hold the same state, and agree on requests to stop; run by all of them together.

Copies of a weight are compared by checksums, in which any one flipped bit shows. An update writes the weights of a forward
anew, from partitions of which there is one copy alone: so the checksums are taken before it, of the weights that the step used.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.distributed import any_rank
from pipeline.runtime.preemption import StoppedError, StopRequest

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Whole numbers are summed as eight bytes each: 32 MiB of them at a time.
_AT_A_TIME = 2**22


def checksum(values: Tensor) -> Tensor:
    """Sum the bits of a tensor as whole numbers of its width, modulo 2⁶⁴: int64, on its device. Any flipped bit changes it."""
    numbers = values.reshape(-1).view(_WHOLE_NUMBERS[values.element_size()])
    return torch.stack([part.sum() for part in numbers.split(_AT_A_TIME)]).sum()


class RanksDisagreeError(RuntimeError):
    """Ranks hold different values where they must be equal: faulty memory, faulty communication, or a bug."""


def check_ranks_agree(values: dict[str, Any], device: torch.device) -> None:
    """Compare named values over ranks by 64-bit digests of their `repr`; one all-gather of 8 bytes per value.

    Raises:
        RanksDisagreeError: names the values that differ, and the ranks that differ from most.
    """
    own = [
        int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True) for value in values.values()
    ]
    gathered = [torch.empty(len(own), dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.tensor(own, dtype=torch.int64, device=device))
    digests_RV = torch.stack(gathered)
    if bool((digests_RV == digests_RV[0]).all()):
        return

    problems = [
        f"{name}: {_difference(digests)}"
        for name, digests in zip(values, digests_RV.T.tolist(), strict=True)
        if len(set(digests)) > 1
    ]
    raise RanksDisagreeError(
        f"ranks that must hold the same values do not: {'; '.join(problems)}. Continue from the last checkpoint, by the same "
        "command; if it happens again, do without that rank's machine"
    )


def _difference(digests: Sequence[int]) -> str:
    """Name the ranks that differ from most, or each, where no value is that of most."""
    common, count = Counter(digests).most_common(1)[0]
    others = ", ".join(str(rank) for rank, digest in enumerate(digests) if digest != common)
    if 2 * count > len(digests):
        return f"rank(s) {others} differ from the others"
    agreed = ", ".join(str(rank) for rank, digest in enumerate(digests) if digest == common)
    return f"rank(s) {others} differ from rank(s) {agreed}"


def end_if_signalled(stop: StopRequest, device: torch.device) -> None:
    """End the job where nothing has to be saved, if any rank has had a signal to stop; collective.

    Raises:
        StoppedError: on all ranks, if one has.
    """
    if any_rank(stop.is_signalled, device):
        raise StoppedError
