"""Verdicts on pairs of arms: computed words, never prose by hand.

A family of comparisons is declared beforehand and judged together. Per pair, in this order: *too few seeds* where not
even the clearest data could be declared different; *better* or *worse* where the adjusted p is below .05 and the
interval of P(better) excludes one half (Bouthillier et al. 2021 ask for both); *equivalent* where two one-sided tests
put the difference inside the margin; otherwise *not separated*, with the difference that could have been found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from harness.stats.comparisons import Comparison, Values, against_constant, paired, permutation, welch
from harness.stats.effects import probability_better
from harness.stats.gate import tost
from harness.stats.intervals import NAN, Interval, bonferroni, join
from harness.stats.multiplicity import holm
from harness.stats.power import detectable_difference
from harness.stats.seed_means import present, strata


class Verdict(StrEnum):
    """What may be said about an arm and its reference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    NOT_SEPARATED = "not separated"
    TOO_FEW_SEEDS = "too few seeds"


class Procedure(StrEnum):
    """Where a family's p values come from, declared before the data are seen."""

    PERMUTATION = "permutation"
    WELCH = "welch"
    PAIRED = "paired"


@dataclass(frozen=True)
class Pair:
    """Two arms to compare.

    Attributes:
        values: of the arm: (S,) seed values, or one array per training reward. ``reference_values``: likewise.
        margin: of equivalence, in the unit of the values (a tenth of the base SD).
        deterministic: the arm has no seed variance, one value per reward. ``reference_deterministic``: likewise.
    """

    arm: str
    reference: str
    values: Values
    reference_values: Values
    margin: float = 0.1
    deterministic: bool = False
    reference_deterministic: bool = False


@dataclass(frozen=True)
class Judgement:
    """All that a table row about a pair needs.

    Attributes:
        difference: arm minus reference, unadjusted interval. ``simultaneous``: the Bonferroni interval.
        comparison: test, raw p and smallest attainable p.
        adjusted_p: Holm within the family. ``smallest_adjusted_p``: the smallest it could have been.
        probability: P(arm better than reference) over pairs of seeds.
        detectable: difference found with 80 % power at the level of Holm's first step.
        family: number of hypotheses declared.
    """

    arm: str
    reference: str
    verdict: Verdict
    sentence: str
    difference: Interval
    simultaneous: Interval
    comparison: Comparison
    adjusted_p: float
    smallest_adjusted_p: float
    probability: Interval
    detectable: float
    family: int


def judge(
    pairs: Sequence[Pair],
    procedure: Procedure = Procedure.PERMUTATION,
    *,
    alpha: float = 0.05,
    level: float = 0.95,
    unit: str = "base SD",
) -> tuple[Judgement, ...]:
    """Judge one family: arms against the reference pooled over rewards, or all pairs of one reward after another.

    Args:
        pairs: every hypothesis of the family, also those whose data are missing.
        procedure: test of stochastic arms; a deterministic side always makes it a one-sample t test.
        alpha: family-wise level.
        level: coverage of the intervals.
        unit: of the values, for the sentences.
    """
    size = len(pairs)
    wide = bonferroni(level, size)
    # The permutation test gives no interval of its own; Welch's stands beside it.
    beside = Procedure.PAIRED if procedure is Procedure.PAIRED else Procedure.WELCH
    comparisons = [_compare(pair, procedure, level) for pair in pairs]
    adjusted = holm([comparison.p for comparison in comparisons])
    smallest = holm([comparison.smallest_p for comparison in comparisons])
    judgements = []
    for pair, comparison, p, floor in zip(pairs, comparisons, adjusted.tolist(), smallest.tolist(), strict=True):
        probability = _probability(pair, level)
        verdict, reason = _verdict(pair, comparison, p, floor, probability, alpha)
        detectable = detectable_difference(comparison.interval, alpha=alpha / size)
        judgement = Judgement(
            arm=pair.arm,
            reference=pair.reference,
            verdict=verdict,
            sentence=_sentence(pair, verdict, reason, comparison, p, probability, detectable, unit),
            difference=comparison.interval,
            simultaneous=_compare(pair, beside, wide).interval,
            comparison=comparison,
            adjusted_p=p,
            smallest_adjusted_p=floor,
            probability=probability,
            detectable=detectable,
            family=size,
        )
        judgements.append(judgement)
    return tuple(judgements)


def _compare(pair: Pair, procedure: Procedure, level: float) -> Comparison:
    """Run the declared test, or the one-sample test where one side is a constant."""
    if pair.deterministic and pair.reference_deterministic:
        gaps = [x - y for x, y in zip(_constants(pair.values), _constants(pair.reference_values), strict=True)]
        note = "no seed variance on either side: an exact difference, nothing to test"
        return Comparison("none", Interval(float(np.mean(gaps)), NAN, NAN, level, note=note), NAN, 1.0, note=note)
    if pair.reference_deterministic:
        return against_constant(pair.values, _constants(pair.reference_values), level=level)
    if pair.deterministic:
        mirrored = [-x for x in strata(pair.reference_values)]
        return against_constant(mirrored, [-x for x in _constants(pair.values)], level=level)
    tests = {Procedure.PERMUTATION: permutation, Procedure.WELCH: welch, Procedure.PAIRED: paired}
    return tests[procedure](pair.values, pair.reference_values, level=level)


def _constants(values: Values) -> list[float]:
    """A deterministic arm's value per reward; NaN where it has none."""
    return [float(kept.mean()) if (kept := present(group)).size else NAN for group in strata(values)]


def _probability(pair: Pair, level: float) -> Interval:
    """P(better) with a deterministic side reduced to its constant."""
    fixed = (pair.deterministic, pair.reference_deterministic)
    sides = [
        [np.array([x]) for x in _constants(values)] if constant else strata(values)
        for values, constant in zip((pair.values, pair.reference_values), fixed, strict=True)
    ]
    return probability_better(sides[0], sides[1], level=level, a_fixed=fixed[0], b_fixed=fixed[1])


def _separable(pair: Pair, level: float) -> bool:
    """Whether the interval of P(better) could exclude one half if the arms did not overlap at all."""
    apart = Pair(
        pair.arm,
        pair.reference,
        [np.ones_like(present(x)) for x in strata(pair.values)],
        [np.zeros_like(present(x)) for x in strata(pair.reference_values)],
        deterministic=pair.deterministic,
        reference_deterministic=pair.reference_deterministic,
    )
    return _probability(apart, level).excludes(0.5)


def _verdict(
    pair: Pair, comparison: Comparison, p: float, floor: float, probability: Interval, alpha: float
) -> tuple[Verdict, str]:
    """The verdict, and the reason where it is not the plain reading of the adjusted p."""
    if pair.deterministic and pair.reference_deterministic:
        return Verdict.NOT_SEPARATED, comparison.note
    if floor > alpha:
        return Verdict.TOO_FEW_SEEDS, f"the smallest adjusted p it allows is {_p(floor)}"
    if not _separable(pair, probability.level):
        return Verdict.TOO_FEW_SEEDS, "even arms that never overlap leave P(better) compatible with one half"
    if p < alpha and probability.excludes(0.5):
        return (Verdict.BETTER if comparison.interval.estimate > 0 else Verdict.WORSE), ""
    if tost(comparison.interval, pair.margin) < alpha:
        return Verdict.EQUIVALENT, ""
    if math.isnan(p):
        return Verdict.NOT_SEPARATED, comparison.note
    reason = "P(better) is compatible with one half" if p < alpha else ""
    return Verdict.NOT_SEPARATED, reason


def _sentence(
    pair: Pair,
    verdict: Verdict,
    reason: str,
    comparison: Comparison,
    p: float,
    probability: Interval,
    detectable: float,
    unit: str,
) -> str:
    """One sentence with the numbers behind it."""
    interval = comparison.interval
    if math.isnan(interval.estimate):
        return f"{pair.arm} and {pair.reference} cannot be compared: one of them has no result."
    difference = f"difference {_bounds(interval, sign='+')} {unit}"
    evidence = f"{difference}, adjusted p {_equals(p)}, P(better) {_bounds(probability)}"
    if verdict in (Verdict.BETTER, Verdict.WORSE):
        return f"{pair.arm} is {verdict} than {pair.reference}: {evidence}."
    if verdict is Verdict.EQUIVALENT:
        return f"{pair.arm} and {pair.reference} are equivalent within ±{pair.margin:.3g} {unit}: {difference}."
    if verdict is Verdict.TOO_FEW_SEEDS:
        return (
            f"{pair.arm} against {pair.reference}: too few seeds, cannot reject at this number of seeds "
            f"(n={interval.n}; {reason}); {difference}."
        )
    power = "" if math.isnan(detectable) else f"; 80 % power only from {detectable:.3g} {unit}"
    return f"{pair.arm} and {pair.reference} are not separated: {join(evidence, reason)}{power}."


def _bounds(interval: Interval, sign: str = "") -> str:
    """Estimate with bounds, to two digits of the half-width; or that there are none."""
    half = interval.half_width
    if not math.isfinite(half):
        return f"{format(interval.estimate, f'{sign}.3g').replace('-', '−')} (no interval)"
    places = min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 2
    every = (interval.estimate, interval.low, interval.high)
    numbers = [format(x, f"{sign}.{places}f").replace("-", "−") for x in every]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _p(p: float) -> str:
    """Three decimals, or the bound below them."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _equals(p: float) -> str:
    """The relation and the number: "= 0.012", "< 0.001", or "undefined"."""
    return "undefined" if math.isnan(p) else "< 0.001" if p < 0.001 else f"= {p:.3f}"
