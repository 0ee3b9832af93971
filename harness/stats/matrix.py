"""Generalisation across rewards: trained on one reward (rows), evaluated on all (columns).

The cells of one row come from the same runs, those of different rows do not. Every summary is therefore first
computed within each run and then treated as a stratified t over rows: that respects the dependence without any
covariance algebra.

Shapes: R training rewards, E evaluation rewards, S training seeds (NaN where rows have fewer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from harness.stats.comparisons import welch
from harness.stats.intervals import NAN, Interval, seed_t
from harness.stats.multiplicity import benjamini_hochberg
from harness.stats.seed_means import Array, present


@dataclass(frozen=True, eq=False)
class Generalisation:
    """One method's matrix of gains and its summaries.

    Attributes:
        cells: R rows of E intervals. ``adjusted_p``: (R, E) Benjamini-Hochberg over the off-target cells, NaN else.
        on_target, off_target: mean gain on the reward trained on, and on all others.
        gap: on target minus off target. Off-target gain of correlated rewards is no generalisation: show
            ``reward_correlations`` beside it.
        worst: (row, column) of the smallest off-target gain; None where there is no off-target cell.
        harmed: off-target cells with a loss at adjusted p below .05 (exploratory).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Interval, ...], ...]
    adjusted_p: Array
    on_target: Interval
    off_target: Interval
    gap: Interval
    worst: tuple[str, str] | None
    harmed: int


def generalisation(
    gains: ArrayLike, rows: Sequence[str], columns: Sequence[str], *, level: float = 0.95, alpha: float = 0.05
) -> Generalisation:
    """Matrix and summaries of one method.

    Args:
        gains: (R, E, S) seed gains in base-SD units; a column that is missing for a whole row is left out of it.
        rows: names of the training rewards.
        columns: names of the evaluation rewards.
        level: coverage of all intervals.
        alpha: level of the harm count.
    """
    table = np.asarray(gains, dtype=np.float64)
    cells = tuple(tuple(seed_t(table[i, j], level=level) for j in range(len(columns))) for i in range(len(rows)))
    estimates = np.array([[cell.estimate for cell in row] for row in cells])
    target = np.array([[row == column for column in columns] for row in rows], dtype=bool)
    other = ~target & np.isfinite(estimates)

    p = np.full(estimates.shape, np.nan)
    p[other] = benjamini_hochberg([cells[i][j].p_value() for i, j in np.argwhere(other)])
    harmed = int((other & (estimates < 0) & (p < alpha)).sum())
    worst = None
    if other.any():
        i, j = divmod(int(np.argmin(np.where(other, estimates, np.inf))), len(columns))
        worst = (rows[i], columns[j])

    on = [table[i, target[i]].mean(axis=0) for i in range(len(rows)) if target[i].any()]
    off = [table[i, other[i]].mean(axis=0) for i in range(len(rows)) if other[i].any()]
    both = [i for i in range(len(rows)) if target[i].any() and other[i].any()]
    gap = [table[i, target[i]].mean(axis=0) - table[i, other[i]].mean(axis=0) for i in both]
    on_target, off_target, difference = (_summary(values, level) for values in (on, off, gap))
    return Generalisation(tuple(rows), tuple(columns), cells, p, on_target, off_target, difference, worst, harmed)


def _summary(per_row: Sequence[Array], level: float) -> Interval:
    """Stratified t; shorter rows are padded with NaN, which says nothing about missing seeds."""
    if not per_row:
        return Interval(NAN, NAN, NAN, level, note="no such cells")
    return seed_t([present(values) for values in per_row], level=level)


def transfer_ratio(transferred: ArrayLike, specialist: ArrayLike, *, level: float = 0.95) -> Interval:
    """Share of the specialist's gain that training on another reward gives, with Fieller's interval (1954).

    The bounds are the r with (a - r b)^2 = t^2 (va + r^2 vb), for gains a, b with variances va, vb of their means and
    Satterthwaite's degrees of freedom at the estimate a / b. Where the specialist's own gain is not separated from 0,
    or the set of such r is unbounded, the ratio means nothing and is undefined.

    Args:
        transferred: (S,) gains on reward j after training on r.
        specialist: (S,) gains on j after training on j.
        level: coverage.
    """
    top, bottom = present(transferred), present(specialist)
    n = min(len(top), len(bottom))
    own = seed_t(bottom, level=level)
    undefined = Interval(NAN, NAN, NAN, level, n, note="undefined: the specialist's gain is not separated from 0")
    if n < 2 or not own.excludes(0.0):
        return undefined if n > 1 else Interval(NAN, NAN, NAN, level, n, note=f"undefined: n={n}")
    a, b = float(top.mean()), float(bottom.mean())
    ratio = a / b
    # The difference a - r b at the estimate has the variance and degrees of freedom that Fieller's theorem needs.
    error = welch(top, ratio * bottom, level=level).interval
    reach = error.half_width / error.standard_error if error.standard_error > 0 else NAN
    va, vb = float(top.var(ddof=1)) / len(top), float(bottom.var(ddof=1)) / len(bottom)
    g = reach**2 * vb / b**2
    if not g < 1:
        return undefined
    half = reach / abs(b) * np.sqrt(va * (1 - g) + ratio**2 * vb)
    return Interval(ratio, (ratio - half) / (1 - g), (ratio + half) / (1 - g), level, n, note="Fieller")


def reward_correlations(scores: ArrayLike) -> Array:
    """Pearson correlation between rewards over the base model's pictures.

    Args:
        scores: (E, N) every reward on the same N pictures; NaN where a reward does not apply.

    Returns:
        (E, E), each entry over the pictures that both rewards score; NaN below three pictures or without spread.
    """
    values = np.asarray(scores, dtype=np.float64)
    result = np.full((len(values), len(values)), np.nan)
    for i, x in enumerate(values):
        for j, y in enumerate(values):
            both = np.isfinite(x) & np.isfinite(y)
            if both.sum() > 2 and np.ptp(x[both]) > 0 and np.ptp(y[both]) > 0:
                result[i, j] = np.corrcoef(x[both], y[both])[0, 1]
    return result
