"""What the data of a step determines: counts, sizes and scales of unequal micro-steps and ranks against plain counting."""

import math

import pytest
import torch
import torch.distributed as dist

from pipeline.weighting.objective import ObjectiveSettings, StepCounts, count_pairs
from tests.ranks import run_ranks

MICRO_STEPS, ROWS, TOKENS, HEADS, RANKS = 3, 2, 7, 3, 2
WEIGHTS = [1.0, 0.25, 2.0]


def valid_of(rank: int, micro_step: int) -> torch.Tensor:
    """Unequal everywhere; the second rank's first micro-step has no pair at all, and its third none of the last head."""
    generator = torch.Generator().manual_seed(10 * rank + micro_step)
    valid = torch.rand(ROWS, TOKENS, HEADS, generator=generator) < 0.2 + 0.3 * micro_step
    if rank == 1 and micro_step == 0:
        valid[:] = False
    if rank == 1 and micro_step == 2:
        valid[..., 2] = False
    return valid


def counted(pool: str, normalize_by: str) -> StepCounts:
    rank = dist.get_rank()
    valid = [valid_of(rank, micro_step).sum(1) for micro_step in range(MICRO_STEPS)]
    objective = ObjectiveSettings(0.6, WEIGHTS, pool, normalize_by)
    return count_pairs(valid, torch.tensor([rank + 1, 10]), objective, torch.device("cpu"), dist.group.WORLD).read()


def size(k_percent: float, num_valid: int) -> int:
    return max(1, math.floor(k_percent * num_valid + 0.5)) if num_valid else 0


def pools_of(pool: str, head: int) -> list[int]:
    """Valid pairs of a head in each pool of the step, over all ranks."""
    counts = torch.stack(
        [torch.stack([valid_of(rank, step)[..., head] for rank in range(RANKS)]) for step in range(MICRO_STEPS)]
    )
    by_pool = {
        "global": counts.sum((1, 2, 3)),
        "step": counts.sum().reshape(1),
        "rank": counts.sum((2, 3)).flatten(),
        "row": counts.sum(3).flatten(),
    }
    return by_pool[pool].tolist()


@pytest.mark.parametrize("normalize_by", ["valid", "selected"])
@pytest.mark.parametrize("pool", ["global", "step", "rank", "row"])
def test_counts_sizes_and_scales_are_those_of_the_whole_step(pool: str, normalize_by: str) -> None:
    counts = run_ranks(counted, RANKS, pool, normalize_by)
    assert counts[0] == counts[1]
    for head in range(HEADS):
        in_pools = pools_of(pool, head)
        selected = sum(in_pools) if head == 0 else sum(size(0.6, count) for count in in_pools)
        assert counts[0].num_selected_H[head] == selected
        assert [of_step[head] for of_step in counts[0].num_valid_AH] == pools_of("global", head)
        divisor = sum(in_pools) if normalize_by == "valid" else selected
        assert counts[0].scale_H[head] == WEIGHTS[head] / (HEADS * divisor)
    sizes = [[size(0.6, count) for count in pools_of(pool, head)] for head in range(1, HEADS)]
    assert counts[0].pool_selected == ([list(each) for each in zip(*sizes, strict=True)] if pool in ("global", "step") else [])
    assert counts[0].data == [3, 20]
    assert len({tuple(of_step) for of_step in counts[0].num_valid_AH}) == MICRO_STEPS, "unequal, or the test shows nothing"
