"""Several data sets as one: which of them each row of a run comes from, as a pure function of the row's number.

Row n of a run is sample n div L of lane n mod L; a lane takes its samples now from this set, now from that one. Two sets of
shares w and 1 − w alternate by Beatty's rule: of its first n samples a lane has taken floor(φ + n·w) from the first one,
so that no prefix of any lane is off by a whole sample, and how far each set has been consumed at any position is a
product and not a replay. More sets are split two by two, by a tree that joins the two lightest again and again (Huffman).
What a fork is off by reaches a set below it times the set's part of that fork, and a set's ancestors weigh at least as
Fibonacci's numbers grow: so a prefix of a lane is off by less than 1 + 1 + 1/2 + 1/3 + 1/5 + … samples, which is 2 with three
sets, 2.5 with four, 2.84 with five and 3.36 with any number. All arithmetic is in integers: shares are exact for ever.

The phase φ differs from lane to lane and is spread evenly over [0, 1), so that a round of the lanes is a mixture as well:
at the root of the tree, hence with two sets, the whole job is off by less than one sample after any round (Hermite's
identity); with more sets by a few, however long the run is (a test measures it). Each set has its own order, with its own
epochs: a lane of the run reads the same lane of the set, from where it left it.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pipeline.config import DataSettings
from pipeline.data.errors import DataError
from pipeline.data.loading.order import EpochOrder
from pipeline.data.shards.manifest import Manifest, Source, read_manifest
from pipeline.data.shards.reference_losses import CachedLosses
from pipeline.data.shards.table import ShardTable
from pipeline.data.shards.writer import MAX_SOURCES
from pipeline.storage.location import Place

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class DataSet:
    """A prepared folder, its part of the rows in proportion to the others' weights, its name ("" for the only one), and the
    cached reference losses that are read along (None: none)."""

    place: Place
    weight: float = 1.0
    name: str = ""
    losses: CachedLosses | None = None


@dataclass(frozen=True)
class _Fork:
    """left, right: a set's index or a fork. share: of the left one. number: of the fork, for its phases."""

    left: "int | _Fork"
    right: "int | _Fork"
    share: Fraction
    number: int


class Schedule:
    """From which set each lane takes which sample.

    Args:
        weights: one a set, above 0; as they are written in decimals, so that 0.7 and 0.3 mean seven of ten.
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
        """The set of a lane's sample in a round, and how many samples the lane has taken from this set before."""
        node, count = self._tree, round_number
        while isinstance(node, _Fork):
            lefts = self._lefts(node, lane, count)
            if self._lefts(node, lane, count + 1) > lefts:
                node, count = node.left, lefts
            else:
                node, count = node.right, count - lefts
        return node, count

    def counts(self, lane: int, num_rounds: int) -> list[int]:
        """How many of a lane's first samples come from each set."""
        counts = [0] * len(self.shares)
        open_nodes = [(self._tree, num_rounds)]
        while open_nodes:
            node, count = open_nodes.pop()
            if isinstance(node, _Fork):
                lefts = self._lefts(node, lane, count)
                open_nodes += [(node.left, lefts), (node.right, count - lefts)]
            else:
                counts[node] = count
        return counts

    def _lefts(self, fork: _Fork, lane: int, count: int) -> int:
        """floor(φ + count · share), φ = phase / L."""
        phase = lane * _multiplier(self.lanes, fork.number) % self.lanes
        above, below = fork.share.numerator, fork.share.denominator
        return (phase * below + count * above * self.lanes) // (below * self.lanes)


def _tree(weights: Sequence[Fraction]) -> int | _Fork:
    nodes: list[tuple[Fraction, int, int | _Fork]] = [(weight, index, index) for index, weight in enumerate(weights)]
    heapq.heapify(nodes)
    for number in range(len(weights) - 1):
        light, _, left = heapq.heappop(nodes)
        heavy, _, right = heapq.heappop(nodes)
        # Numbered from the root, whatever the number of sets.
        fork = _Fork(left, right, light / (light + heavy), len(weights) - 2 - number)
        heapq.heappush(nodes, (light + heavy, len(weights) + number, fork))
    return nodes[0][2]


@lru_cache
def _multiplier(lanes: int, number: int) -> int:
    """What carries lane to phase: near a golden fraction of L, another one for each fork, and without a common divisor."""
    multiplier = lanes * ((number + 1) * _GOLDEN % 2**64) >> 64
    while math.gcd(multiplier, lanes) != 1:
        multiplier += 1
    return multiplier


class MixtureOrder:
    """Where each row of a run lies: (set, shard index, sample index); with one set, that set's own order."""

    def __init__(self, orders: Sequence[EpochOrder], weights: Sequence[float]) -> None:
        self.orders = list(orders)
        self.lanes = orders[0].lanes
        self.schedule = Schedule(weights, self.lanes)

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sets, shards and samples, int64 [num_rounds], of one lane in consecutive rounds."""
        if len(self.orders) == 1:
            return np.zeros(num_rounds, np.int64), *self.orders[0].locate_lane(lane, first_round, num_rounds)
        sets = np.array([self.schedule.choose(lane, first_round + offset)[0] for offset in range(num_rounds)], np.int64)
        shards, samples = np.empty(num_rounds, np.int64), np.empty(num_rounds, np.int64)
        for number, consumed in enumerate(self.schedule.counts(lane, first_round)):
            own = sets == number
            shards[own], samples[own] = self.orders[number].locate_lane(lane, consumed, int(own.sum()))
        return sets, shards, samples

    def consumed(self, num_rows: int) -> list[int]:
        """Rows of each set among the first `num_rows` of the run."""
        rounds, beyond = divmod(num_rows, self.lanes)
        by_lane = (self.schedule.counts(lane, rounds + (lane < beyond)) for lane in range(self.lanes))
        return [sum(counts) for counts in zip(*by_lane, strict=True)]


def sets_of(settings: DataSettings) -> list[DataSet]:
    """The training data that was asked for."""
    if settings.mixture is not None:
        return [DataSet(each.path, each.weight, each.name) for each in settings.mixture]
    assert settings.path is not None
    return [DataSet(settings.path)]


def read_joined(settings: DataSettings) -> Manifest:
    """The manifest of the training data that was asked for.

    Raises:
        DataError: a folder is not a prepared one, or the sets do not go together.
    """
    sets = sets_of(settings)
    return join([read_manifest(each.place, settings.access) for each in sets], sets)[0]


def order_of(
    manifests: Sequence[Manifest], sets: Sequence[DataSet], *, lanes: int, seed: int, shuffle_block: int
) -> MixtureOrder:
    """The order of a run over these sets; a single one's is that of its folder alone."""
    orders = [
        EpochOrder(ShardTable.of(manifest.shards).samples, lanes=lanes, seed=seed, shuffle_block=shuffle_block)
        for manifest in manifests
    ]
    return MixtureOrder(orders, [each.weight for each in sets])


def join(manifests: Sequence[Manifest], sets: Sequence[DataSet]) -> tuple[Manifest, list[np.ndarray | None]]:
    """One manifest for all sets, and for each what turns its source indices into the joined ones' (None: nothing to do).

    A set without named sources counts as a source of the set's name; sources of the same name are one.

    Raises:
        DataError: the sets do not go together.
    """
    first = manifests[0]
    if len(manifests) == 1:
        return first, [None]
    for key, what in (("sequence_length", "rows of another length"), ("tokenizer_sha256", "another tokenizer")):
        for each, manifest in zip(sets, manifests, strict=True):
            if getattr(manifest, key) != getattr(first, key):
                raise DataError(
                    f"data.mixture: {each.place} was prepared with {what} than {sets[0].place} "
                    f"({getattr(manifest, key)}, {getattr(first, key)}); prepare both alike"
                )
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
            # How many documents it has is not on record.
            yield Source(name=name, documents=0, tokens=manifest.num_tokens)
        yield from (source for source in manifest.sources if source.name == name)
