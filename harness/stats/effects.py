"""How large an effect is: gains over the base model, standardised gains, and the chance that one arm beats another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from harness.stats.intervals import NAN, Interval, join, missing_note
from harness.stats.seed_means import Array, SeedScores, is_constant, present, strata

Values = ArrayLike | Sequence[ArrayLike]


def gain(tuned: SeedScores, base: SeedScores) -> SeedScores:
    """Score of each picture minus that of the base model for the same prompt and latent.

    The pairing matters: with a base evaluation of its own latents, shared by all seeds, the test of a gain rejects
    far too often. Pictures that the base lacks are missing in the gain. ``base`` holds one seed.
    """
    if len(base.seeds) != 1:
        raise ValueError(f"the base model is one cell, not {len(base.seeds)} seeds")
    matched = np.full(tuned.values.shape[1:], np.nan)
    rows = {prompt: i for i, prompt in enumerate(base.prompts)}
    columns = {picture: i for i, picture in enumerate(base.pictures)}
    for i, prompt in enumerate(tuned.prompts):
        for j, picture in enumerate(tuned.pictures):
            if prompt in rows and picture in columns:
                matched[i, j] = base.values[0, rows[prompt], columns[picture]]
    return SeedScores(tuned.values - matched, tuned.seeds, tuned.prompts, tuned.pictures)


def standardised(gains: ArrayLike, base_sd: float) -> Array:
    """Gains in units of the base model's spread within a prompt; NaN where that spread is zero or unknown."""
    values = np.asarray(gains, dtype=np.float64)
    return values / base_sd if base_sd > 0 else np.full_like(values, np.nan)


def hedges_g(a: ArrayLike, b: ArrayLike) -> float:
    """Difference of means over the pooled SD of seed means, without small-sample bias (Hedges 1981).

    g = J d with the exact J = Gamma(m / 2) / (sqrt(m / 2) Gamma((m - 1) / 2)), m = S_a + S_b - 2. Its unit is the
    spread between seeds: values of 4 are common and say little about pictures. NaN without spread.
    """
    x, y = present(a), present(b)
    m = len(x) + len(y) - 2
    if min(len(x), len(y)) < 1 or m < 2 or (is_constant(x) and is_constant(y)):
        return NAN
    pooled = math.sqrt((x.var() * len(x) + y.var() * len(y)) / m)
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return float(correction * (x.mean() - y.mean()) / pooled)


def probability_better(
    a: Values, b: Values, *, level: float = 0.95, a_fixed: bool = False, b_fixed: bool = False
) -> Interval:
    """P(X > Y) + P(X = Y) / 2 over pairs of seeds, averaged over rewards, with a score interval.

    Newcombe's method 5 (2006): with N = (m + n) / 2 - 1 and m, n seeds,
    V(t) = t (1 - t) (1 + N ((1 - t) / (2 - t) + t / (1 + t))) / (m n), and the bounds solve
    |estimate - t| = z sqrt(V(t)). For R rewards V is the mean of the V_r over R, at one common t. V is concave up to
    five seeds and almost so beyond, so different t per reward would not give a wider interval. It stays inside [0, 1]
    and has a width at complete separation.

    Args:
        a: (S,) seed values, or one array per reward.
        b: likewise.
        level: coverage.
        a_fixed: the arm is deterministic, a constant without sampling error; V is then the binomial t (1 - t) / S of
            the other arm (Wilson 1927).
        b_fixed: likewise.
    """
    groups = [*strata(a), *strata(b)]
    kept = [present(group) for group in groups]
    count = len(kept) // 2
    pairs = list(zip(kept[:count], kept[count:], strict=True))
    n = min(map(len, [x for x, _ in pairs] * (not a_fixed) + [y for _, y in pairs] * (not b_fixed)), default=0)
    note = missing_note(groups, kept)
    if any(x.size == 0 or y.size == 0 for x, y in pairs):
        return Interval(NAN, NAN, NAN, level, n, note=join("no data", note))
    estimate = float(np.mean([(np.sign(x[:, None] - y).mean() + 1) / 2 for x, y in pairs]))
    if a_fixed and b_fixed:
        return Interval(estimate, NAN, NAN, level, n, note=join("no seed variance on either side", note))

    def variance(t: float) -> float:
        total = sum(_newcombe(t, math.inf if a_fixed else len(x), math.inf if b_fixed else len(y)) for x, y in pairs)
        return total / len(pairs) ** 2

    low, high = _score_bounds(estimate, variance, float(stats.norm.ppf((1 + level) / 2)))
    return Interval(estimate, low, high, level, n, note=note)


def _newcombe(t: float, m: float, n: float) -> float:
    """Variance of the estimate if P(X > Y) is t; an infinite count stands for a constant."""
    if math.isinf(m) or math.isinf(n):
        return t * (1 - t) / min(m, n)
    return t * (1 - t) * (1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)


def _score_bounds(estimate: float, variance: Callable[[float], float], z: float) -> tuple[float, float]:
    """Both solutions of (estimate - t)^2 = z^2 V(t) in [0, 1]."""

    def excess(t: float) -> float:
        return (estimate - t) ** 2 - z**2 * variance(t)

    # V is zero at 0 and 1, so an estimate there is itself a root; the search stops short of it.
    inside = 1e-9
    low = 0.0 if estimate < 2 * inside else float(optimize.brentq(excess, 0.0, estimate - inside))
    high = 1.0 if estimate > 1 - 2 * inside else float(optimize.brentq(excess, estimate + inside, 1.0))
    return low, high


def best_of_n_equivalent(base: SeedScores, gain: float) -> float:
    """Smallest n for which keeping the best of n base pictures gains at least ``gain`` in the same reward.

    E[best of n] comes without bias from the K sorted pictures of a prompt, sum_i x_(i) C(i - 1, n - 1) / C(K, n),
    and is averaged over prompts. Infinity where even n = K is not enough: "more than K". NaN without data.
    """
    rows = [np.sort(present(row)) for row in base.values[0]]
    rows = [row for row in rows if row.size]
    if not rows or not math.isfinite(gain):
        return NAN
    mean = float(np.mean([row.mean() for row in rows]))
    for n in range(1, min(map(len, rows)) + 1):
        best = np.mean([_expected_maximum(row, n) for row in rows])
        if best - mean >= gain - 1e-12 * abs(mean):
            return float(n)
    return math.inf


def _expected_maximum(ordered: Array, n: int) -> float:
    """Mean of the largest of n values over all subsets of size n."""
    ranks = np.arange(n, len(ordered) + 1)
    logs = special.gammaln(ranks) - special.gammaln(ranks - n + 1) - special.gammaln(n)
    weights = np.exp(logs - logs.max())
    return float((ordered[n - 1 :] * weights).sum() / weights.sum())
