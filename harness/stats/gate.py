"""The regression gate: has a new version become worse than a pinned baseline by more than a margin?

Same method, same seeds, same latents, so the comparison is paired; the shared randomness is what gives it power. The
margin is fixed beforehand in base-SD units and never in units of the observed spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from harness.stats.comparisons import Values, paired, welch
from harness.stats.intervals import Interval
from harness.stats.power import seeds_needed
from harness.stats.seed_means import strata


class GateOutcome(StrEnum):
    """What the gate says; only ``WORSE`` is a failure."""

    IDENTICAL = "identical"
    EQUIVALENT = "equivalent"
    IMPROVED = "improved"
    NOT_WORSE = "not worse"
    WORSE = "WORSE"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class GateResult:
    """Outcome of the gate.

    Attributes:
        difference: new minus baseline; its level 1 - 2 alpha makes each bound a one-sided test at ``alpha``.
        p_not_worse: of the non-inferiority test. ``p_equivalent``: of the two one-sided tests.
        seeds_needed: for an answer, if the truth is no change; only where inconclusive.
    """

    outcome: GateOutcome
    difference: Interval
    margin: float
    p_not_worse: float
    p_equivalent: float
    seeds_needed: int | None = None


def non_inferiority(difference: Interval, margin: float) -> float:
    """One-sided p of the hypothesis that the difference is -margin or less."""
    return difference.p_value(-margin, "greater")


def tost(difference: Interval, margin: float) -> float:
    """Two one-sided tests (Schuirmann 1987): p of the hypothesis that the difference is outside (-margin, margin)."""
    return float(np.maximum(difference.p_value(-margin, "greater"), difference.p_value(margin, "less")))


def gate(new: Values, baseline: Values, margin: float, *, alpha: float = 0.05, same_seeds: bool = True) -> GateResult:
    """Compare seed values of a new version with those of the baseline.

    Identical numbers need no statistics. Otherwise, by the interval of the difference: inside (-margin, margin) is
    equivalent, above 0 improved, above -margin not worse, below -margin WORSE, across -margin inconclusive.

    Args:
        new: (S,) seed values in base-SD units, or one array per reward.
        baseline: likewise.
        margin: largest acceptable loss, positive.
        alpha: level of each one-sided test.
        same_seeds: paired by position; otherwise Welch.
    """
    if not margin > 0:
        raise ValueError(f"the margin must be positive: {margin}")
    level = 1 - 2 * alpha
    comparison = paired(new, baseline, level=level) if same_seeds else welch(new, baseline, level=level)
    difference = comparison.interval
    p_worse, p_equivalent = non_inferiority(difference, margin), tost(difference, margin)
    if _identical(new, baseline):
        outcome = GateOutcome.IDENTICAL
    elif -margin < difference.low and difference.high < margin:
        outcome = GateOutcome.EQUIVALENT
    elif difference.low > 0:
        outcome = GateOutcome.IMPROVED
    elif difference.low > -margin:
        outcome = GateOutcome.NOT_WORSE
    elif difference.high < -margin:
        outcome = GateOutcome.WORSE
    else:
        sd = difference.standard_error * np.sqrt(difference.n if same_seeds else difference.n / 2)
        needed = seeds_needed(margin, sd, alpha=alpha, sides=1, design="paired" if same_seeds else "independent")
        return GateResult(GateOutcome.INCONCLUSIVE, difference, margin, p_worse, p_equivalent, needed)
    return GateResult(outcome, difference, margin, p_worse, p_equivalent)


def _identical(new: Values, baseline: Values) -> bool:
    """Bit for bit the same finite numbers."""
    pairs = zip(strata(new), strata(baseline), strict=True)
    return all(bool(np.isfinite(x).all()) and np.array_equal(x, y) for x, y in pairs)
