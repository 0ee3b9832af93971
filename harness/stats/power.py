"""What a design can find: the smallest difference it detects, and the seeds that a difference needs.

A result that is not significant says nothing without the difference it could have found (Card et al. 2020, Colas et
al. 2018).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from harness.stats.intervals import NAN, Interval

Design = Literal["independent", "paired"]


def t_power(noncentrality: float, df: float, alpha: float, *, sides: Literal[1, 2] = 2) -> float:
    """Chance that a t test at level ``alpha`` rejects when its statistic has this noncentrality."""
    critical = -special.stdtrit(df, alpha / sides)
    upper = 1 - special.nctdtr(df, noncentrality, critical)
    lower = special.nctdtr(df, noncentrality, -critical) if sides == 2 else 0.0
    # The noncentral t of scipy gives NaN far out in the tails, where the probability is 1 or 0.
    far = 1.0 if noncentrality > critical else 0.0
    return float(np.clip(np.nan_to_num(upper, nan=far) + np.nan_to_num(lower, nan=0.0), 0.0, 1.0))


def detectable_noncentrality(df: float, alpha: float, power: float, *, sides: Literal[1, 2] = 2) -> float:
    """Noncentrality at which the test has this power; NaN where it is undefined."""
    if not (df > 0 and 0 < alpha < power < 1):
        return NAN
    high = 1.0
    while t_power(high, df, alpha, sides=sides) < power:
        high *= 2
        if high > 1e6:
            return NAN
    return float(optimize.brentq(lambda x: t_power(x, df, alpha, sides=sides) - power, 0.0, high))


def detectable_difference(interval: Interval, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Difference that the t test behind an interval finds with this power, in the interval's unit.

    It uses the standard error that was observed, which at few seeds is itself uncertain. For a family of m
    hypotheses under Holm, ``alpha`` / m is the safe choice. NaN where the interval is undefined.
    """
    return interval.standard_error * detectable_noncentrality(interval.df, alpha, power)


def minimum_detectable_difference(
    seeds: int,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    design: Design = "independent",
    sides: Literal[1, 2] = 2,
) -> float:
    """Smallest difference found with this power, in units of the SD of seed means (of differences if paired).

    Two arms of S seeds: noncentrality d sqrt(S / 2), df 2 S - 2; paired: d sqrt(S), df S - 1. NaN below two seeds.
    """
    if seeds < 2:
        return NAN
    df, scale = _design(seeds, design)
    return detectable_noncentrality(df, alpha, power, sides=sides) * math.sqrt(scale)


def _design(seeds: int, design: Design) -> tuple[int, float]:
    """Degrees of freedom, and the variance of the difference in units of that of a seed mean (of a difference)."""
    return (2 * seeds - 2, 2 / seeds) if design == "independent" else (seeds - 1, 1 / seeds)


def seeds_needed(
    difference: float,
    sd: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    design: Design = "independent",
    sides: Literal[1, 2] = 2,
    limit: int = 10_000,
) -> int | None:
    """Fewest seeds per arm that find ``difference`` when seed means have this SD; None above ``limit`` or undefined."""
    if not (abs(difference) > 0 and sd > 0 and math.isfinite(difference) and math.isfinite(sd)):
        return None
    target = abs(difference) / sd

    def enough(seeds: int) -> bool:
        df, scale = _design(seeds, design)
        return t_power(target / math.sqrt(scale), df, alpha, sides=sides) >= power

    low, high = 1, 2
    while not enough(high):
        low, high = high, high * 2
        if low >= limit:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= limit else None


def pilot_inflation(seeds: float, *, assurance: float = 0.8) -> float:
    """Factor on the SD of a pilot study so that it reaches the true SD with this probability.

    sqrt((S - 1) / chi2_{1 - assurance}(S - 1)): an SD from 3 seeds is too small more often than not. NaN below 2. For
    an SD that several arms or rewards gave together, S is its degrees of freedom plus one.
    """
    if seeds < 2:
        return NAN
    return math.sqrt((seeds - 1) / float(stats.chi2.ppf(1 - assurance, seeds - 1)))
