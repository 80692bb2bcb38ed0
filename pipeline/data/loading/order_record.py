"""The order of a run as a JSON value, from which it can be computed again without the data.

The row at each position is a pure function of the numbers of samples in the shards and of a few settings. The samples are
numbered through all sets and shards, in the manifests' order (`Sample.number`).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipeline.data.loading.mixture import DataSet, MixtureOrder
from pipeline.data.loading.order import EpochOrder
from pipeline.data.loading.skipping import without_rows

# A damaged record must not ask for all memory.
_MOST_ROWS, _MOST_SHARDS = 2**24, 2**26


def record_of_order(order: MixtureOrder, sets: Sequence[DataSet], global_batch: int) -> dict[str, Any]:
    """Describe an order. `shards`: of each set [samples of a shard, number of such shards in a row], …"""
    first = order.orders[0]
    described = [
        {"name": each.name, "weight": each.weight, "shards": _runs(of_set.shard_samples)}
        for each, of_set in zip(sets, order.orders, strict=True)
    ]
    settings = {"seed": first.seed, "shuffle_block": first.shuffle_block, "lanes": order.lanes, "global_batch": global_batch}
    return settings | {"sets": described}


def order_of_record(record: dict[str, Any]) -> MixtureOrder:
    """Build the order that `record_of_order` describes.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it is no such record. DataError: a set is too small for the lanes.
    """
    sizes = {key: int(record[key]) for key in ("lanes", "seed", "shuffle_block")}
    num_rows, lanes = int(record["global_batch"]), sizes["lanes"]
    if not 0 < lanes <= num_rows <= _MOST_ROWS or num_rows % lanes or sizes["shuffle_block"] < 1 or sizes["seed"] < 0:
        raise ValueError(f"lanes, rows, blocks or a seed that no run can have: {num_rows} and {sizes}")
    weights = {str(each["name"]): float(each["weight"]) for each in record["sets"]}
    if not len(weights) == len(record["sets"]) > 0 or not all(0 < weight < float("inf") for weight in weights.values()):
        raise ValueError(f"names or weights that no run can have: {weights}")
    return MixtureOrder([EpochOrder(_sizes_of(each["shards"]), **sizes) for each in record["sets"]], list(weights.values()))


def sample_numbers(order: MixtureOrder, first_round: int, num_rounds: int, skipped: Iterable[Sequence[int]] = ()) -> np.ndarray:
    """Compute the number of the sample in each row of consecutive rounds of all lanes: int64 [rounds · L].

    skipped: stretches of rows that are left out (`skipping`), multiples of L.
    """
    rows = without_rows(order, skipped, order.lanes)
    sizes = [each.num_samples for each in order.orders]
    before_set = np.array(list(itertools.accumulate(sizes, initial=0)))
    before_shard = [np.cumsum(each.shard_samples) - each.shard_samples for each in order.orders]

    numbers_RL = np.empty((num_rounds, order.lanes), np.int64)
    for lane in range(order.lanes):
        sets, shards, samples = rows.locate_lane(lane, first_round, num_rounds)
        for number, before in enumerate(before_shard):
            own = sets == number
            numbers_RL[own, lane] = before_set[number] + before[shards[own]] + samples[own]
    return numbers_RL.ravel()


def _sizes_of(runs: Sequence[Sequence[int]]) -> np.ndarray:
    """The samples of each shard."""
    sizes, counts = np.array(runs, np.int64).reshape(-1, 2).T
    if min(sizes, default=0) < 1 or min(counts) < 1 or max(counts) > _MOST_SHARDS or counts.sum() > _MOST_SHARDS:
        raise ValueError("numbers of samples or shards that no data can have")
    return np.repeat(sizes, counts)


def _runs(sizes: np.ndarray) -> list[list[int]]:
    return [[size, len(list(same))] for size, same in itertools.groupby(sizes.tolist())]
