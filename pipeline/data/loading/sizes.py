"""Checks that lanes, batches, ranks, workers and data fit together; each problem is a sentence with values that would fit."""

import math

from pipeline.data.loading.order import too_few_samples

_MAX_LISTED = 12


def check_sizes(
    *,
    lanes: int,
    global_batch: int,
    micro_batch: int | None,
    world_size: int,
    num_workers: int = 0,
    num_samples: int | None = None,
) -> list[str]:
    """Check the sizes of a run against each other.

    Args:
        lanes: L. global_batch: G, rows a step. micro_batch: B, rows a rank and micro-step; None
            if it will be chosen to fit the others.
        world_size: R, the number of ranks.
        num_workers: DataLoader processes of a rank.
        num_samples: of the smallest data set; None to leave that unchecked.

    Returns:
        One sentence for each problem, with the values that would fit; empty if all sizes fit.
    """
    # Every size by itself.
    sizes = {
        "data.lanes": lanes,
        "data.global_batch": global_batch,
        "data.micro_batch": 1 if micro_batch is None else micro_batch,
        "the number of ranks": world_size,
    }
    problems = [f"{name} = {size}: expected at least 1" for name, size in sizes.items() if size < 1]
    if num_workers < 0:
        problems.append(f"data.num_workers = {num_workers}: expected at least 0")
    if problems:
        return problems

    # The sizes against each other.
    if global_batch % lanes:
        problems.append(
            f"data.global_batch = {global_batch} is not a multiple of data.lanes = {lanes}; "
            f"lanes that fit: {_listed(divisors(global_batch), near=lanes)}"
        )
    problems += _rank_problems(lanes, global_batch, micro_batch, world_size, num_workers)
    if num_samples is not None and num_samples < lanes:
        problems.append(too_few_samples(num_samples, lanes))
    return problems


def _rank_problems(lanes: int, global_batch: int, micro_batch: int | None, world_size: int, num_workers: int) -> list[str]:
    if micro_batch is None and lanes % world_size:
        return [
            f"data.lanes = {lanes} is not a multiple of the number of ranks, {world_size}; numbers of ranks that fit: "
            f"{_listed(divisors(lanes), near=world_size)}; for {world_size} ranks {_remedy(lanes, global_batch, 1, world_size)}"
        ]
    micro_batch = micro_batch or 1
    if lanes % (world_size * micro_batch):
        parts = [
            f"data.lanes = {lanes} is not a multiple of ranks × data.micro_batch = {world_size} × {micro_batch}",
            _remedy(lanes, global_batch, micro_batch, world_size),
            *_other_remedies(lanes, global_batch, micro_batch, world_size),
        ]
        return ["; ".join(parts)]

    own_lanes = lanes // world_size
    if num_workers > own_lanes:
        return [
            f"data.num_workers = {num_workers}, but each of the {world_size} ranks has {own_lanes} of the {lanes} lanes and a "
            f"worker needs one of its own: expected at most {own_lanes}"
        ]
    return []


def _other_remedies(lanes: int, global_batch: int, micro_batch: int, world_size: int) -> list[str]:
    """List the values that each size may have while the others stay; nothing of a size that has none."""
    ranks = divisors(lanes // micro_batch) if lanes % micro_batch == 0 else []
    micro_batches = divisors(lanes // world_size) if lanes % world_size == 0 else []
    numbers_of_lanes = [number for number in divisors(global_batch) if number % (world_size * micro_batch) == 0]
    ways = [
        (f"with micro-batches of {micro_batch}, numbers of ranks that fit", ranks, world_size),
        (f"with {world_size} ranks, micro-batches that fit", micro_batches, micro_batch),
        ("with both as they are, data.lanes that fit", numbers_of_lanes, lanes),
    ]
    return [f"{way}: {_listed(sizes, near=size)}" for way, sizes, size in ways if sizes]


def _remedy(lanes: int, global_batch: int, micro_batch: int, world_size: int) -> str:
    """Suggest settings for as many ranks as there are: the largest micro-batch that fits, else a global batch that does."""
    fitting = [size for size in divisors(lanes // world_size) if size <= micro_batch] if lanes % world_size == 0 else []
    if fitting:
        return f"write data.micro_batch={fitting[-1]}"
    micro_step = world_size * micro_batch
    rows = micro_step * -(-global_batch // micro_step)
    return f"write data.global_batch={rows} data.lanes={micro_step}"


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending; up to its root, beyond which each is the partner of one below."""
    lower = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return lower + [number // divisor for divisor in reversed(lower) if divisor**2 != number]


def _listed(numbers: list[int], near: int) -> str:
    """Format numbers; of many, only the `_MAX_LISTED` nearest to `near`."""
    nearest = sorted(sorted(numbers, key=lambda number: abs(number - near))[:_MAX_LISTED])
    return ", ".join(map(str, nearest))
