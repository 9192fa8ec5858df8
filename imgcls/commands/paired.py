"""Medians of paired measurements with an interval that assumes nothing of their distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval that covers the true one at least with the probability asked for."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def median_of_ratios(ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median of ``ours[i] / theirs[i]``."""
    return median_with_interval([a / b for a, b in zip(ours, theirs, strict=True)], confidence)


def median_with_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median and its interval between two order statistics (Conover 1999, Practical Nonparametric Statistics, 3.2).

    The number of values below the true median is binomial with probability 1/2, whatever the distribution. With fewer
    than six values no such interval reaches 0.95: it is -inf..inf.
    """
    ordered = sorted(values)
    rank = _rank(len(ordered), (1 - confidence) / 2)
    if rank == 0:
        return Estimate(statistics.median(ordered), -math.inf, math.inf)
    return Estimate(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


def _rank(count: int, tail: float) -> int:
    """The largest r with P(fewer than r of ``count`` below the median) <= ``tail``; 0 if there is none."""
    rank, below = 0, 0.0
    while True:
        below += math.comb(count, rank) / 2**count
        if below > tail or rank == count:
            return rank
        rank += 1
