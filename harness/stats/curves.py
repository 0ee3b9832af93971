"""Learning curves over training seeds, and the scalars by which they may be compared.

Shapes: S training seeds, G grid points of cumulative reward queries, the same for all methods. Nothing is smoothed
or interpolated. Bands are pointwise and for reading; claims go through one scalar per seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from harness.stats.intervals import Interval, seed_t
from harness.stats.seed_means import Array


@dataclass(frozen=True, eq=False)
class TimeToThreshold:
    """Queries until a gain is reached, cut at the budget.

    Attributes:
        times: (S,) min(T, budget); NaN for a seed without a curve.
        reached: how many of the ``n`` seeds with a curve reached the threshold: to be printed as "k of n".
        interval: of the restricted mean.
    """

    times: Array
    reached: int
    n: int
    interval: Interval


def band(values: ArrayLike, *, level: float = 0.95) -> tuple[Interval, ...]:
    """Pointwise t interval at each of the G grid points of (S, G) values.

    All points hold together far less often than each one: at twenty points a 95 % band contains the whole curve in
    about half of all cases (`docs/statistics.md`).
    """
    return tuple(seed_t(column, level=level) for column in np.asarray(values, dtype=np.float64).T)


def log_auc(queries: ArrayLike, values: ArrayLike) -> Array:
    """Mean height of each seed's curve over the logarithm of queries, in the unit of the values.

    Trapezoids over log(queries), divided by their range, so that a constant curve gives its constant. The base
    model's point at zero queries has no logarithm and is left out (a gain is 0 there by definition).

    Args:
        queries: (G,) grid, increasing.
        values: (S, G).

    Returns:
        (S,); NaN for a seed with a missing point, and for all where fewer than two different positive grid points
        exist.
    """
    grid, curves = np.asarray(queries, dtype=np.float64), np.atleast_2d(np.asarray(values, dtype=np.float64))
    positive = grid > 0
    if np.unique(grid[positive]).size < 2:
        return np.full(len(curves), np.nan)
    x = np.log(grid[positive])
    return np.asarray(np.trapezoid(curves[:, positive], x, axis=1) / (x[-1] - x[0]), dtype=np.float64)


def time_to_threshold(
    queries: ArrayLike, values: ArrayLike, threshold: float, *, level: float = 0.95
) -> TimeToThreshold:
    """First grid point at which each curve reaches the threshold; restricted mean over seeds.

    Seeds that never reach it count with the budget (the last grid point): leaving them out would reward methods that
    fail. The threshold is fixed beforehand, not read off the same curves. A seed whose curve breaks off counts as not
    reaching; one without any value is missing.

    Args:
        queries: (G,) grid, increasing.
        values: (S, G), NaN after a curve broke off.
        threshold: in the unit of the values.
        level: coverage.
    """
    grid, curves = np.asarray(queries, dtype=np.float64), np.atleast_2d(np.asarray(values, dtype=np.float64))
    hits = curves >= threshold
    reached = hits.any(axis=1)
    times = np.where(reached, grid[np.argmax(hits, axis=1)], grid[-1])
    known = np.isfinite(curves).any(axis=1)
    times = np.where(known, times, np.nan)
    return TimeToThreshold(times, int(reached.sum()), int(known.sum()), seed_t(times, level=level))
