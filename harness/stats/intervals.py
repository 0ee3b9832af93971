"""Confidence intervals over training seeds.

The default is Student's t on seed means: with three to ten seeds it keeps its coverage, where bootstrap intervals
do not. Where a mean over *unseen* prompts is the target, seeds and prompts are crossed random factors and the
standard error comes from the two-way analysis of variance with Satterthwaite's degrees of freedom.

Shapes: S training seeds, P prompts. Missing values are NaN; they are left out and the note says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from harness.stats.seed_means import Array, is_constant, present, strata

NAN = float("nan")


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; the bounds are NaN, and the note says why, where there is none.

    Attributes:
        n: seeds behind it; the smallest count where several groups enter.
        standard_error, df: of the t distribution it was read from; NaN for intervals of another kind.
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95
    n: int = 0
    standard_error: float = NAN
    df: float = NAN
    note: str = ""

    @property
    def half_width(self) -> float:
        """Half the distance of the bounds."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside; False where there is no interval."""
        return self.low > value or self.high < value

    def p_value(self, null: float = 0.0, alternative: Literal["two-sided", "greater", "less"] = "two-sided") -> float:
        """P value of the t test that the interval inverts; NaN where it is not a t interval."""
        if not (self.standard_error > 0 and self.df > 0):
            return NAN
        t = (self.estimate - null) / self.standard_error
        if alternative == "two-sided":
            return float(2 * special.stdtr(self.df, -abs(t)))
        return float(special.stdtr(self.df, -t if alternative == "greater" else t))


@dataclass(frozen=True)
class Part:
    """An independent contribution to the variance of an estimate, with its degrees of freedom."""

    variance: float
    df: float


def bonferroni(level: float, hypotheses: int) -> float:
    """Level at which each of several intervals is drawn so that all hold together with at least ``level``."""
    return 1 - (1 - level) / max(hypotheses, 1)


def t_interval(estimate: float, parts: Sequence[Part], *, n: int, level: float = 0.95, note: str = "") -> Interval:
    """Student interval of an estimate whose variance is a sum of independent parts (Satterthwaite 1946).

    v = sum v_i, df = v^2 / sum(v_i^2 / df_i). Parts may be negative (a subtracted mean square). Where they cancel, the
    formula goes to zero degrees of freedom and the interval to infinity; df is therefore at least the smallest of the
    parts', which it always is without subtraction.
    """
    reason = ""
    if n < 1 or not math.isfinite(estimate):
        reason = "no data"
    elif n == 1 or any(part.df <= 0 for part in parts):
        reason = "n=1: no interval"
    elif sum(part.variance for part in parts) <= 0:
        reason = "identical seeds: no variance to estimate an interval from"
    if reason:
        return Interval(estimate, NAN, NAN, level, n, note=join(reason, note))
    variance = sum(part.variance for part in parts)
    # Scaled before squaring: the squares of tiny variances would underflow.
    satterthwaite = 1 / sum((part.variance / variance) ** 2 / part.df for part in parts)
    df = max(satterthwaite, min(part.df for part in parts))
    error = math.sqrt(variance)
    reach = float(special.stdtrit(df, (1 + level) / 2)) * error
    if n == 2:
        note = join("n=2: very wide interval", note)
    return Interval(estimate, estimate - reach, estimate + reach, level, n, error, df, note)


def mean_part(values: Array, weight: float = 1.0) -> Part:
    """Variance weight^2 s^2 / S of a weighted mean of S seeds, with S - 1 degrees of freedom."""
    if len(values) < 2 or is_constant(values):
        return Part(0.0, len(values) - 1)
    return Part(weight**2 * float(values.var(ddof=1)) / len(values), len(values) - 1)


def seed_t(seed_means: ArrayLike | Sequence[ArrayLike], *, level: float = 0.95) -> Interval:
    """Student interval of the mean over seeds, for the prompt suite as it is.

    Args:
        seed_means: (S,) seed means; or R arrays of them, one per training reward. The rewards are fixed and weigh
            the same, their runs are independent: se^2 = sum_r s_r^2 / S_r / R^2 (stratified t).
        level: coverage.
    """
    groups = strata(seed_means)
    kept = [present(group) for group in groups]
    estimate = sum(float(g.mean()) for g in kept) / len(kept) if all(g.size for g in kept) else NAN
    parts = [mean_part(group, 1 / len(kept)) for group in kept]
    return t_interval(estimate, parts, n=min(map(len, kept)), level=level, note=missing_note(groups, kept))


def crossed(cells: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of the mean over seeds and *unseen* prompts, both random (Owen and Eckles 2012 for the setting).

    With row means r, column means c and the interaction mean square E of the (S, P) cell means:
    v = max(var(r)/S + var(c)/P - E/(SP), var(r)/S). The maximum keeps the interval from being shorter than that of
    the fixed suite.
    """
    tables, note = _complete([cells])
    return _crossed(tables, level, note)


def crossed_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of mean(a) - mean(b) over seeds and unseen prompts; both arms are scored on the same P prompts.

    v = max(vA + vB + vP - vE, vA + vB) with vA, vB the variances of the seed means over S, vP the variance over
    prompts of the difference of column means over P, and vE the interaction mean squares over S P, each with its own
    degrees of freedom. What of the prompt effect both arms share cancels exactly.

    Args:
        a: (S_a, P) cell means.
        b: (S_b, P), same prompts in the same order.
        level: coverage.
    """
    tables, note = _complete([a, b])
    return _crossed(tables, level, note)


def _crossed(arms: list[Array], level: float, note: str) -> Interval:
    """Student interval of the mean of one, or of the difference of two, complete (S, P) tables."""
    n, p = min(map(len, arms)), arms[0].shape[1]
    if n == 0 or p == 0:
        return t_interval(NAN, [], n=0, level=level, note=note)
    column_means = arms[0].mean(axis=0) - (arms[1].mean(axis=0) if len(arms) > 1 else 0.0)
    parts = [mean_part(table.mean(axis=1)) for table in arms]
    if p == 1:
        note = join("one prompt: holds for this prompt only", note)
    elif n > 1:
        noise = [Part(-_interaction(table) / table.size, (len(table) - 1) * (p - 1)) for table in arms]
        extra = [mean_part(column_means), *noise]
        if sum(part.variance for part in extra) > 1e-12 * extra[0].variance:  # more than rounding
            parts += extra
    return t_interval(float(column_means.mean()), parts, n=n, level=level, note=note)


def _interaction(table: Array) -> float:
    """Mean square of what row and column means leave over, with (S - 1)(P - 1) degrees of freedom."""
    rows, columns = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    left_over = table - rows - columns + table.mean()
    return float((left_over**2).sum() / ((len(table) - 1) * (table.shape[1] - 1)))


def _complete(tables: Sequence[ArrayLike]) -> tuple[list[Array], str]:
    """Leave out seeds without any score, then prompts that some seed lacks: the formulas need balanced tables."""
    arrays = [np.atleast_2d(np.asarray(table, dtype=np.float64)) for table in tables]
    kept = [array[np.isfinite(array).any(axis=1)] for array in arrays]
    whole = np.logical_and.reduce([np.isfinite(array).all(axis=0) for array in kept])
    lost = int((~whole).sum())
    note = join(missing_note(arrays, kept), f"{lost} incomplete prompts left out" if lost else "")
    return [array[:, whole] for array in kept], note


def clopper_pearson(events: int, runs: int, *, level: float = 0.95) -> Interval:
    """Exact interval of a rate (Clopper and Pearson 1934): no collapse in 5 runs still allows 52 %."""
    if runs == 0:
        return Interval(NAN, NAN, NAN, level, 0, note="no data")
    bounds = stats.binomtest(events, runs).proportion_ci(level, method="exact")
    return Interval(events / runs, float(bounds.low), float(bounds.high), level, runs)


def missing_note(groups: Sequence[Array], kept: Sequence[Array]) -> str:
    """Say how many seeds were left out because they have no value."""
    lost = sum(map(len, groups)) - sum(map(len, kept))
    return f"{lost} seed values missing" if lost else ""


def join(*notes: str) -> str:
    """One note from several, the empty ones left out."""
    return "; ".join(note for note in notes if note)
