"""Curves of a run's records: what is drawn of a metric over its steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.report.run_files import Record, RunFiles

MOST_POINTS = 400
"""Points of a curve; of more, those of a stretch are averaged."""


class Curve(NamedTuple):
    """A line of a chart. y: NaN where there is no value. key: of its look, the same in all charts."""

    label: str
    key: str
    x: list[float]
    y: list[float]


def curve_of(run: RunFiles, records: Sequence[Record], value: Callable[[Record], object], label: str, key: str) -> Curve:
    """Return the curve of a value over the steps of records, thinned to `MOST_POINTS`."""
    points = [(float(record["step"]), _number(value(record))) for record in records]
    return Curve(label, key, *_thinned(points))


@dataclass(frozen=True)
class Metric:
    """Reads one metric of a record."""

    name: str

    def __call__(self, record: Record) -> object:
        return record.get(self.name)


@dataclass(frozen=True)
class Enrichment:
    """A source's share of a head's selected pairs over its share of all, also of records that do not have it."""

    head: int
    source: str

    def __call__(self, record: Record) -> object:
        found = record.get(f"enrichment_head_{self.head}_source_{self.source}")
        of_source = record.get(f"selected_ratio_head_{self.head}_source_{self.source}")
        of_all = record.get(f"selected_ratio_head_{self.head}")
        return found if found is not None or not of_all or of_source is None else of_source / of_all


def has_values(curve: Curve) -> bool:
    return any(map(math.isfinite, curve.y))


def _number(value: object) -> float:
    """A finite number as it is; NaN of anything else, which is then a gap."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Average stretches of equally many points, so that a long run's page stays small."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    stretches = [points[first : first + size] for first in range(0, len(points), size)]
    return [stretch[-1][0] for stretch in stretches], [_mean([y for _, y in stretch]) for stretch in stretches]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
