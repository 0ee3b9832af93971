"""Adjusted p values for a family of hypotheses that was declared before looking.

A hypothesis that could not be tested has p = NaN: it stays NaN but counts in the size of the family, because it was
planned; dropping it afterwards would make the others look better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from harness.stats.seed_means import Array


def holm(p: ArrayLike) -> Array:
    """Holm's step-down adjustment (1979): controls the chance of any false claim in the family.

    With the m p values sorted, adjusted_(i) = max_{k <= i} min(1, (m - k + 1) p_(k)).

    Applied to the smallest p values that each test can attain, it gives the smallest attainable adjusted ones.
    """
    raw = np.asarray(p, dtype=np.float64)
    filled = np.where(np.isnan(raw), 1.0, raw)
    order = np.argsort(filled, kind="stable")
    stepped = np.maximum.accumulate(np.minimum(1.0, filled[order] * np.arange(len(raw), 0, -1)))
    adjusted = np.empty_like(filled)
    adjusted[order] = stepped
    return np.where(np.isnan(raw), np.nan, adjusted)


def benjamini_hochberg(p: ArrayLike) -> Array:
    """Benjamini and Hochberg's adjustment (1995): bounds the expected share of false claims, for exploration only."""
    raw = np.asarray(p, dtype=np.float64)
    if raw.size == 0:
        return raw
    adjusted = stats.false_discovery_control(np.where(np.isnan(raw), 1.0, raw))
    return np.asarray(np.where(np.isnan(raw), np.nan, adjusted), dtype=np.float64)
