"""Tests of paired differences: Student's t and the exact sign test, Holm's correction for several of them.

The distribution of t has a finite form for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), so that no
library is needed.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class PairedTest(NamedTuple):
    """The outcome of a comparison of n pairs.

    mean: of the differences. low, high: its 95 % interval. p_t, p_sign: two-sided. differences: one a pair.
    """

    mean: float
    low: float
    high: float
    p_t: float
    p_sign: float
    differences: list[float]


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compare two lists of paired values by their differences, first minus second; at least two pairs."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    freedom, mean = len(differences) - 1, statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = quantile_of_t(0.975, freedom) * error
    p_t = 2 * (1 - t_probability(abs(mean) / error, freedom)) if error else float(mean == 0)
    return PairedTest(mean, mean - half, mean + half, p_t, sign_test(differences), differences)


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided probability of so uneven signs, if either is as likely; zeros are left out."""
    signs = [difference > 0 for difference in differences if difference]
    fewer = min(sum(signs), len(signs) - sum(signs))
    return min(1.0, 2 * sum(math.comb(len(signs), count) for count in range(fewer + 1)) / 2 ** len(signs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method (1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, (len(p_values) - place) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def t_probability(t: float, freedom: int) -> float:
    """Probability that Student's t with so many degrees of freedom is at most t, for t >= 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)

    # A(t | n) = P(|T| <= t): sums of n / 2 powers of the cosine, that of odd n with the angle beside it.
    term, total = 1.0, 1.0
    first = 3 if freedom % 2 else 2
    for step in range(first, freedom, 2):
        term *= (step - 1) / step * cosine**2
        total += term
    if freedom % 2 == 0:
        within = math.sin(angle) * total
    else:
        within = 2 / math.pi * (angle + (math.sin(angle) * cosine * total if freedom > 1 else 0))
    return 0.5 + within / 2


def quantile_of_t(probability: float, freedom: int) -> float:
    """The t below which Student's t lies with a probability of more than a half, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
    return (low + high) / 2
