"""Means with 95% intervals over seeds, paired differences, and accuracies read off a frontier."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; the last serves for more, on the safe side."""


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of the 95% interval; None for the width of a single value.

    >>> interval([1.0, 2.0, 3.0])[0], round(interval([1.0, 2.0, 3.0])[1], 3), interval([4.0])
    (2.0, 2.484, (4.0, None))
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = T95[min(len(values) - 1, len(T95)) - 1]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def compared(differences: Sequence[float]) -> tuple[str, float, float | None]:
    """Whether paired differences are "above", "level" or "below", with their mean and half width.

    Level means that zero is in the interval.

    A single pair has no interval: its sign is a tendency and nothing more.

    >>> compared([0.02, 0.03, 0.02])[0], compared([0.02, -0.03])[0], compared([-0.01])[0]
    ('above', 'level', 'below')
    """
    mean, half = interval(differences)
    margin = half or 0.0
    return ("above" if mean > margin else "below" if mean < -margin else "level"), mean, half


def frontier_at(points: Sequence[tuple[float, float]], cost: float) -> float:
    """The accuracy that a rival has at `cost`, read off the line through its (cost, accuracy) points.

    Below its cheapest point it gets that point's accuracy, above its dearest that one's: in its favour either way.

    >>> frontier_at([(0.2, 0.80), (0.4, 0.90)], 0.3), frontier_at([(0.2, 0.8)], 0.1)
    (0.85, 0.8)
    """
    ordered = sorted(points)
    if cost <= ordered[0][0]:
        return ordered[0][1]
    for (left, low), (right, high) in pairwise(ordered):
        if cost <= right:
            share = (cost - left) / (right - left) if right > left else 1.0
            return round(low + share * (high - low), 12)
    return ordered[-1][1]
