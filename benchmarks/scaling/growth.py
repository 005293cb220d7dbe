"""How a cost grows with a size, and at which size it meets a limit."""

import math
from collections.abc import Sequence
from itertools import pairwise

CONSTANT, LINEAR, SORTING = 0.15, 1.15, 1.35
"""Exponents up to which a cost is called constant, linear, and that of sorting: between 8,000 and 64,000,
n log n has the exponent 1.1, and leaving a cache on the way adds to it."""


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size by least squares, over the upper half of the sizes; 0 without costs."""
    points = list(zip(values, costs, strict=True))[min(len(values) // 2, len(values) - 2) :]
    upper = [(math.log(value), math.log(cost)) for value, cost in points if cost > 0]
    if len(upper) < 2:
        return 0.0
    mean_x, mean_y = (sum(axis) / len(upper) for axis in zip(*upper, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in upper)
    return sum((x - mean_x) * (y - mean_y) for x, y in upper) / spread


def verdict(slope: float) -> str:
    """What an exponent is called."""
    if slope <= CONSTANT:
        return "constant"
    if slope <= LINEAR:
        return "linear" if slope > 1 - CONSTANT else "less than linear"
    return "n log n" if slope <= SORTING else "WORSE"


def wall(values: Sequence[float], costs: Sequence[float], limit: float) -> float | None:
    """The size at which the cost reaches `limit`.

    Between measured sizes and beyond them it follows a power of the size, the nearest two or `exponent`. None
    where it does not grow enough for that to mean anything.
    """
    points = list(zip(values, costs, strict=True))
    if points[0][1] >= limit:
        return values[0]
    for (value, cost), (next_value, next_cost) in pairwise(points):
        if next_cost >= limit:
            share = math.log(limit / cost) / math.log(next_cost / cost)
            return value * (next_value / value) ** share
    slope = exponent(values, costs)
    if slope <= CONSTANT or costs[-1] <= 0:
        return None
    return values[-1] * (limit / costs[-1]) ** (1 / slope)
