"""Whether lanes, batches, ranks, workers and data go together; what does not, as sentences that say what would."""

from pipeline.data.loading.order import too_few_samples

_MAX_LISTED = 12


def check_sizes(
    *,
    lanes: int,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    num_workers: int = 0,
    num_samples: int | None = None,
) -> list[str]:
    """What does not fit, as sentences that say what would; empty if all fits."""
    sizes = {
        "data.lanes": lanes,
        "data.global_batch": global_batch,
        "data.micro_batch": micro_batch,
        "the number of ranks": world_size,
    }
    problems = [f"{name} = {size}: expected at least 1" for name, size in sizes.items() if size < 1]
    if num_workers < 0:
        problems.append(f"data.num_workers = {num_workers}: expected at least 0")
    if problems:
        return problems
    if global_batch % lanes:
        problems.append(
            f"data.global_batch = {global_batch} is not a multiple of data.lanes = {lanes}; "
            f"lanes that fit: {_listed(_divisors(global_batch), near=lanes)}"
        )
    problems += _rank_problems(lanes, global_batch, micro_batch, world_size, num_workers)
    if num_samples is not None and num_samples < lanes:
        problems.append(too_few_samples(num_samples, lanes))
    return problems


def _rank_problems(lanes: int, global_batch: int, micro_batch: int, world_size: int, num_workers: int) -> list[str]:
    if lanes % (world_size * micro_batch):
        micro_step = world_size * micro_batch
        fitting = [number for number in _divisors(global_batch) if number % micro_step == 0]
        return [
            f"data.lanes = {lanes} is not a multiple of ranks × data.micro_batch = {world_size} × {micro_batch}; "
            f"with micro-batches of {micro_batch}, numbers of ranks that fit: "
            f"{_listed(_divisors(lanes // micro_batch) if lanes % micro_batch == 0 else [], near=world_size)}; "
            f"with {world_size} ranks, micro-batches that fit: "
            f"{_listed(_divisors(lanes // world_size) if lanes % world_size == 0 else [], near=micro_batch)}; "
            f"with both as they are, data.lanes that fit: {_listed(fitting, near=lanes)}"
        ]
    own_lanes = lanes // world_size
    if num_workers > own_lanes:
        return [
            f"data.num_workers = {num_workers}, but each of the {world_size} ranks has {own_lanes} of the {lanes} lanes and a "
            f"worker needs one of its own: expected at most {own_lanes}"
        ]
    return []


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int], near: int) -> str:
    """The numbers, of many those nearest to `near`."""
    nearest = sorted(sorted(numbers, key=lambda number: abs(number - near))[:_MAX_LISTED])
    return ", ".join(map(str, nearest)) or "none"
