"""Rates found by simulation, and the bands in which they must lie.

A rate from n repetitions has the standard error sqrt(p (1 - p) / n). A claim holds where the rate is within three of
them: two-sided where a procedure is claimed exact, one-sided where it is claimed to be on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.stats.intervals import Interval


@dataclass(frozen=True)
class Rate:
    """How often something happened in n repetitions."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.n

    def __str__(self) -> str:
        """Three decimals."""
        return f"{self.value:.3f}"


def share(flags: Iterable[object]) -> Rate:
    """The rate of true among the flags."""
    found = [bool(flag) for flag in flags]
    return Rate(sum(found), len(found))


def coverage(intervals: Iterable[Interval], truth: float | Sequence[float] | np.ndarray) -> Rate:
    """The rate of intervals that contain the truth, one for all or one for each; no interval contains nothing."""
    every = list(intervals)
    targets = np.broadcast_to(np.asarray(truth, dtype=np.float64), len(every))
    return share(i.low <= t <= i.high for i, t in zip(every, targets, strict=True))


def slack(nominal: float, n: int) -> float:
    """Three standard errors of a rate of n repetitions whose true value is the nominal one."""
    return 3 * math.sqrt(nominal * (1 - nominal) / n)


def assert_exact(rate: Rate, nominal: float) -> None:
    """The rate is the nominal one."""
    assert abs(rate.value - nominal) <= slack(nominal, rate.n), f"{rate} is not {nominal} (n={rate.n})"


def assert_at_least(rate: Rate, nominal: float) -> None:
    """The rate is the nominal one or above."""
    assert rate.value >= nominal - slack(nominal, rate.n), f"{rate} is below {nominal} (n={rate.n})"


def assert_at_most(rate: Rate, nominal: float) -> None:
    """The rate is the nominal one or below."""
    assert rate.value <= nominal + slack(nominal, rate.n), f"{rate} is above {nominal} (n={rate.n})"
