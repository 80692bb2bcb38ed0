"""Mixtures: several data sets read as one, where the data set of each row is a pure function of the row's number.

Row n of a run is sample n div L of lane n mod L, and a schedule chooses the set of each sample of a lane. It is stateless and
of low discrepancy, instead of random draws: every prefix of a lane has very nearly the right share of each set, and the
samples taken from each set before any position follow from a formula, not from a replay.

Two sets. With shares w and 1 − w, a lane takes from the first set, among its first n samples,

    floor(φ + n·w)

(a Beatty sequence), so no prefix of a lane is off by a whole sample.

More sets. A Huffman tree over the weights splits them two by two, each fork by the rule above. The error of a fork reaches a
set below it multiplied by the set's share of the fork, and the weights of a set's ancestors grow at least as Fibonacci
numbers do. A prefix of a lane is therefore off by less than 1 + 1 + 1/2 + 1/3 + 1/5 + … samples: 2 with three sets, 2.5 with
four, 2.84 with five, 3.36 with any number.

Lanes. The phase φ differs from lane to lane and is spread evenly over [0, 1), so that a round of all lanes is a mixture too.
With two sets the whole job is off by less than one sample after any round (Hermite's identity); with more sets by a few
samples, however long the run is (a test measures it).

All arithmetic is in integers, so shares stay exact. Each set has its own order and its own epochs: a lane of the run reads
the same lane of the set, from where it left off.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.loading.order import EpochOrder
from pipeline.data.shards.manifest import Manifest, Source, read_manifest, tokenizer_difference
from pipeline.data.shards.reference_losses import CachedLosses
from pipeline.data.shards.table import ShardTable
from pipeline.data.shards.writer import MAX_SOURCES
from pipeline.data_settings import DataSettings
from pipeline.storage.location import Location

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class DataSet:
    """One data set of a run.

    location: of the prepared folder.
    weight: its share of the rows is its weight over the sum of all weights.
    name: in a mixture; "" for a single set.
    losses: cached reference losses to read with the samples; None where there are none.
    """

    location: Location
    weight: float = 1.0
    name: str = ""
    losses: CachedLosses | None = None


@dataclass(frozen=True)
class _Fork:
    """An inner node of the tree. `left` and `right` are set indices or forks; `share` is that of `left`; `number` selects the
    fork's phases."""

    left: "int | _Fork"
    right: "int | _Fork"
    share: Fraction
    number: int


class Schedule:
    """The schedule that chooses the data set of every sample of every lane.

    Args:
        weights: one for each set, above 0. They are taken as decimals, so that 0.7 and 0.3 mean exactly seven of ten.
        lanes: L.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        assert exact
        assert min(exact) > 0
        self.lanes = lanes
        self.shares = [weight / sum(exact) for weight in exact]
        self._tree = _tree(exact)

    def choose(self, lane: int, round_number: int) -> tuple[int, int]:
        """Choose the set of a lane's sample in a round: (set index, samples the lane took from this set before)."""
        node, count = self._tree, round_number
        while isinstance(node, _Fork):
            num_left = self._num_left(node, lane, count)
            if self._num_left(node, lane, count + 1) > num_left:
                node, count = node.left, num_left
            else:
                node, count = node.right, count - num_left
        return node, count

    def counts(self, lane: int, num_rounds: int) -> list[int]:
        """Count the samples of each set in a lane's first `num_rounds` rounds."""
        counts = [0] * len(self.shares)
        open_nodes = [(self._tree, num_rounds)]
        while open_nodes:
            node, count = open_nodes.pop()
            if isinstance(node, _Fork):
                num_left = self._num_left(node, lane, count)
                open_nodes += [(node.left, num_left), (node.right, count - num_left)]
            else:
                counts[node] = count
        return counts

    def _num_left(self, fork: _Fork, lane: int, count: int) -> int:
        """Count the samples that go to the left of a fork, of the first `count`: floor(φ + count · share), φ = phase / L."""
        # In integers: with share = above / below, floor((phase · below + count · above · L) / (below · L)).
        phase = lane * _multiplier(self.lanes, fork.number) % self.lanes
        above, below = fork.share.numerator, fork.share.denominator
        return (phase * below + count * above * self.lanes) // (below * self.lanes)


def _tree(weights: Sequence[Fraction]) -> int | _Fork:
    """Build the Huffman tree over the weights; with a single set its index 0."""
    nodes: list[tuple[Fraction, int, int | _Fork]] = [(weight, index, index) for index, weight in enumerate(weights)]
    heapq.heapify(nodes)
    for number in range(len(weights) - 1):
        light, _, left = heapq.heappop(nodes)
        heavy, _, right = heapq.heappop(nodes)
        # The root is number 0, for any number of sets.
        fork = _Fork(left, right, light / (light + heavy), len(weights) - 2 - number)
        heapq.heappush(nodes, (light + heavy, len(weights) + number, fork))
    return nodes[0][2]


@lru_cache
def _multiplier(lanes: int, number: int) -> int:
    """Choose a fork's multiplier from lane to phase: near a golden-ratio fraction of L, and coprime to L, so that the phases of
    the L lanes are all different."""
    multiplier = lanes * ((number + 1) * _GOLDEN % 2**64) >> 64
    while math.gcd(multiplier, lanes) != 1:
        multiplier += 1
    return multiplier


class MixtureOrder:
    """The order of a run's rows over all its sets. With one set it is that set's own order.

    Args:
        orders: the order of each set, all with the same number of lanes.
        weights: of each set.
    """

    def __init__(self, orders: Sequence[EpochOrder], weights: Sequence[float]) -> None:
        self.orders = list(orders)
        self.lanes = orders[0].lanes
        self.schedule = Schedule(weights, self.lanes)

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Locate the samples of one lane in consecutive rounds: set, shard and sample indices, int64 [num_rounds] each."""
        if len(self.orders) == 1:
            return np.zeros(num_rounds, np.int64), *self.orders[0].locate_lane(lane, first_round, num_rounds)
        sets = np.array([self.schedule.choose(lane, first_round + offset)[0] for offset in range(num_rounds)], np.int64)
        shards, samples = np.empty(num_rounds, np.int64), np.empty(num_rounds, np.int64)
        for number, consumed in enumerate(self.schedule.counts(lane, first_round)):
            own = sets == number
            shards[own], samples[own] = self.orders[number].locate_lane(lane, consumed, int(own.sum()))
        return sets, shards, samples

    def consumed(self, num_rows: int) -> list[int]:
        """Count the rows of each set among the first `num_rows` of the run."""
        rounds, remainder = divmod(num_rows, self.lanes)
        by_lane = (self.schedule.counts(lane, rounds + (lane < remainder)) for lane in range(self.lanes))
        return [sum(counts) for counts in zip(*by_lane, strict=True)]


def sets_of(settings: DataSettings) -> list[DataSet]:
    """List the data sets of training that the settings name."""
    if settings.mixture is not None:
        return [DataSet(each.path, each.weight, each.name) for each in settings.mixture]
    assert settings.path is not None
    return [DataSet(settings.path)]


def held_out_sets(settings: DataSettings) -> list[DataSet]:
    """List the held-out data sets that the settings name; the name of an only one is ""."""
    return [DataSet(path, name=name) for name, path in settings.validation_sets.items()]


def read_joined(settings: DataSettings) -> Manifest:
    """Read the manifests of the training data and join them.

    Raises:
        DataError: a folder is not a prepared one, or the sets do not go together.
    """
    sets = sets_of(settings)
    return join([read_manifest(each.location, settings.access) for each in sets], sets)[0]


def order_of(
    manifests: Sequence[Manifest], sets: Sequence[DataSet], *, lanes: int, seed: int, shuffle_block: int
) -> MixtureOrder:
    """Build the order of a run over these sets."""
    orders = [
        EpochOrder(ShardTable.of(manifest.shards).samples, lanes=lanes, seed=seed, shuffle_block=shuffle_block)
        for manifest in manifests
    ]
    return MixtureOrder(orders, [each.weight for each in sets])


def join(manifests: Sequence[Manifest], sets: Sequence[DataSet]) -> tuple[Manifest, list[np.ndarray | None]]:
    """Join the manifests of all sets into one.

    A set without named sources counts as one source with the set's name. Sources of the same name become one source.

    Returns:
        The joined manifest, and for each set uint8 [sources of the set], the index of each source in the joined manifest;
        None for a single set, which needs no translation.

    Raises:
        DataError: the sets differ in sequence length or tokenizer, or have too many sources together.
    """
    first = manifests[0]
    if len(manifests) == 1:
        return first, [None]

    # All sets must have rows of one length and of one tokenizer.
    for each, manifest in zip(sets, manifests, strict=True):
        if manifest.sequence_length != first.sequence_length:
            raise DataError(
                f"data.mixture: {each.location} was prepared with rows of another length than {sets[0].location} "
                f"({manifest.sequence_length}, {first.sequence_length}); prepare both alike"
            )
    # Each with every other one: what one manifest does not tell, two others may tell differently.
    for (each, manifest), (other, other_manifest) in itertools.combinations(zip(sets, manifests, strict=True), 2):
        if (difference := tokenizer_difference(manifest, other_manifest)) is not None:
            raise DataError(
                f"data.mixture: {other.location} was prepared with another tokenizer than {each.location} ({difference}); "
                "prepare both alike"
            )

    # Number the sources of all sets together.
    names = list(dict.fromkeys(name for pair in zip(manifests, sets, strict=True) for name in _source_names(*pair)))
    if len(names) > MAX_SOURCES:
        raise DataError(f"data.mixture: the sets have {len(names)} sources together, expected at most {MAX_SOURCES}")
    maps = [
        np.array([names.index(name) for name in _source_names(*pair)], np.uint8) for pair in zip(manifests, sets, strict=True)
    ]
    sources = tuple(_joined_source(name, manifests, sets) for name in names)
    shards = ShardTable.joined([ShardTable.of(manifest.shards) for manifest in manifests])
    return first.model_copy(update={"sources": sources, "shards": shards}), list(maps)


def _source_names(manifest: Manifest, of: DataSet) -> tuple[str, ...]:
    return manifest.source_names or (of.name,)


def _joined_source(name: str, manifests: Sequence[Manifest], sets: Sequence[DataSet]) -> Source:
    parts = list(_parts(name, manifests, sets))
    return Source(name=name, documents=sum(part.documents for part in parts), tokens=sum(part.tokens for part in parts))


def _parts(name: str, manifests: Sequence[Manifest], sets: Sequence[DataSet]) -> Iterator[Source]:
    for manifest, of in zip(manifests, sets, strict=True):
        if not manifest.sources and of.name == name:
            # The manifest does not record how many documents it has.
            yield Source(name=name, documents=0, tokens=manifest.num_tokens)
        yield from (source for source in manifest.sources if source.name == name)
