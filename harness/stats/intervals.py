"""Confidence intervals over training seeds.

The default is Student's t on seed means: with three to ten seeds it keeps its coverage, where bootstrap intervals
do not. Where a mean over *unseen* prompts is the target, seeds and prompts are crossed random factors and the
standard error comes from the two-way analysis of variance with Satterthwaite's degrees of freedom.

Shapes: S training seeds, P prompts. Missing values are NaN; they are left out and the note says so.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from harness.stats.seed_means import Array, is_constant, present, strata

NAN = float("nan")
ENUMERATION_LIMIT = 20_000
BOOTSTRAP_DRAWS = 10_000


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
            return float(2 * stats.t.sf(abs(t), self.df))
        return float(stats.t.sf(t if alternative == "greater" else -t, self.df))


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

    v = sum v_i, df = v^2 / sum(v_i^2 / df_i). Parts may be negative (a subtracted mean square).
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
    df = 1 / sum((part.variance / variance) ** 2 / part.df for part in parts)
    error = math.sqrt(variance)
    reach = float(stats.t.ppf((1 + level) / 2, df)) * error
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
    table, note = complete(np.asarray(cells, dtype=np.float64))
    s, p = table.shape
    if s < 2 or p < 2:
        return seed_t(average_rows(table), level=level) if p == 1 else _no_table(table, level, note)
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    noise = Part(-interaction(table) / (s * p), (s - 1) * (p - 1))
    return _crossed(float(table.mean()), [mean_part(rows)], mean_part(columns), [noise], s, level, note)


def crossed_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of mean(a) - mean(b) over seeds and unseen prompts; both arms are scored on the same P prompts.

    v = max(vA + vB + vP - vE, vA + vB) with vA, vB the variances of the seed means over S, vP the variance over
    prompts of the difference of column means over P, and vE the interaction mean squares over S P, each with its own
    degrees of freedom. The part of the prompt effect that both arms share cancels exactly.

    Args:
        a: (S_a, P) cell means. ``b``: (S_b, P), same prompts in the same order.
        level: coverage.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    both, note = complete(np.concatenate([first, second]), split=len(first))
    kept_a = int(np.isfinite(first).any(axis=1).sum())
    first, second = both[:kept_a], both[kept_a:]
    p = both.shape[1]
    seeds = min(len(first), len(second))
    if seeds < 2 or p < 2:
        estimate = float(first.mean() - second.mean()) if seeds and p else NAN
        parts = [mean_part(first.mean(axis=1)), mean_part(second.mean(axis=1))] if p else []
        why = join("one prompt: interval for this prompt only", note) if p == 1 else note
        return t_interval(estimate, parts, n=seeds, level=level, note=why)
    noise = [Part(-interaction(x) / (len(x) * p), (len(x) - 1) * (p - 1)) for x in (first, second)]
    arms = [mean_part(first.mean(axis=1)), mean_part(second.mean(axis=1))]
    prompts = mean_part(first.mean(axis=0) - second.mean(axis=0))
    return _crossed(float(first.mean() - second.mean()), arms, prompts, noise, seeds, level, note)


def _crossed(
    estimate: float, arms: list[Part], prompts: Part, noise: list[Part], n: int, level: float, note: str
) -> Interval:
    """Use the full variance where prompts add to it, and the seeds' alone where the subtraction goes below that."""
    adds = prompts.variance + sum(part.variance for part in noise) > 0
    return t_interval(estimate, [*arms, prompts, *noise] if adds else arms, n=n, level=level, note=note)
