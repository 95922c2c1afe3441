"""The points of a curve: taken from metrics rows, thinned and smoothed."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Points = list[tuple[float, float]]
"""(step, value) in order of step; a value that is not finite is NaN, which matplotlib draws as a gap."""


def points_of(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    """Return the points of one metric."""
    return [(row["step"], _plottable(row[key])) for row in rows if key in row]


def _plottable(value: float | None) -> float:
    # matplotlib's axis overflows near the largest float.
    return value if value is not None and abs(value) < 1e300 else math.nan


def finite_values(points: Iterable[tuple[float, float]]) -> list[float]:
    """Return the values that are not NaN."""
    return [value for _, value in points if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def coordinates(points: Points) -> tuple[list[float], list[float]]:
    """Return steps and values, as matplotlib takes them."""
    return [step for step, _ in points], [value for _, value in points]


def _bins(points: Points, most: int) -> Iterator[Points]:
    size = math.ceil(len(points) / most)
    return (points[start : start + size] for start in range(0, len(points), size))


def thin(points: Points, most: int = 2000) -> Points:
    """Thin a curve to about ``most`` points: every bin keeps its lowest and highest; a bin of NaN stays a gap."""
    if len(points) <= most:
        return points
    thinned: Points = []
    for bin_ in _bins(points, most // 2):
        finite = [point for point in bin_ if not math.isnan(point[1])] or bin_[:1]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        thinned.extend(sorted(ends))
    return thinned


def smooth(points: Points) -> Points:
    """Return a centred moving mean over a twentieth of the run, whose window shrinks towards the first step.

    A centred window does not lag; a shrinking one keeps the steep fall of the first steps.
    """
    binned = [(_mean([step for step, _ in bin_]), _mean(finite_values(bin_))) for bin_ in _bins(points, 400)]
    smoothed: Points = []
    for index, (step, value) in enumerate(binned):
        half_width = min(index, len(binned) // 40 + 1)
        window = finite_values(binned[index - half_width : index + half_width + 1])
        smoothed.append((step, value if math.isnan(value) else _mean(window)))
    return smoothed
