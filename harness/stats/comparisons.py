"""Comparing two arms over training seeds.

Every function takes seed values of one reward, or one array per training reward; rewards are then fixed strata of
equal weight and the question is whether one arm is better on average over them. Seeds of different methods are
independent, so Welch's test is primary; pairing by seed is for designs that declared it beforehand.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.stats.intervals import (
    NAN,
    Interval,
    join,
    mean_part,
    missing_note,
    seed_t,
    t_interval,
)
from harness.stats.seed_means import Array, content_rng, is_constant, present, strata

EXACT_LIMIT = 2_000_000
MONTE_CARLO_DRAWS = 99_999

Values = ArrayLike | Sequence[ArrayLike]


@dataclass(frozen=True)
class Comparison:
    """The difference of two arms with a test of no difference.

    Attributes:
        test: name of the test that gave ``p``.
        interval: first arm minus second, with its t interval.
        p: two-sided; NaN where the test is undefined, and the note says why.
        smallest_p: the smallest p that the test can give at these seed counts, whatever the data.
        arrangements: how many relabellings a permutation test has; ``exact`` if all were counted, and otherwise
            99 999 random ones were. 0 for t tests.
        correlation: between the arms' seeds, for description only; NaN for independent arms.
    """

    test: str
    interval: Interval
    p: float
    smallest_p: float
    arrangements: int = 0
    exact: bool = True
    correlation: float = NAN
    note: str = ""


def _from_interval(test: str, interval: Interval, correlation: float = NAN) -> Comparison:
    """A t test has no smallest p: it can reject at any level once it is defined."""
    smallest = 0.0 if interval.n > 1 else 1.0
    return Comparison(test, interval, interval.p_value(), smallest, correlation=correlation, note=interval.note)


def welch(a: Values, b: Values, *, level: float = 0.95) -> Comparison:
    """Welch's unequal-variance t test of mean(a) - mean(b) (1947), stratified where several rewards are given.

    d = mean_r (a_r - b_r), v = sum_r (s_ar^2 / S_ar + s_br^2 / S_br) / R^2, Satterthwaite's degrees of freedom.

    Args:
        a: (S_a,) seed values, or R arrays of them.
        b: likewise, same rewards in the same order.
        level: coverage of the interval.
    """
    pairs = _pairs(a, b)
    groups = [group for pair in pairs for group in pair]
    kept = [present(group) for group in groups]
    count = len(pairs)
    complete = all(group.size for group in kept)
    estimate = sum(float(x.mean() - y.mean()) for x, y in zip(kept[::2], kept[1::2], strict=True)) if complete else NAN
    parts = [mean_part(group, 1 / count) for group in kept]
    n = min(map(len, kept))
    interval = t_interval(estimate / count, parts, n=n, level=level, note=missing_note(groups, kept))
    return _from_interval("Welch t" if count == 1 else "stratified Welch t", interval)


def paired(a: Values, b: Values, *, level: float = 0.95) -> Comparison:
    """Student's t test of the differences seed by seed, for arms that were designed to share their randomness.

    Args:
        a: (S,) seed values, or R arrays of them.
        b: likewise; the same position is the same seed.
        level: coverage of the interval.
    """
    differences, correlations = [], []
    for x, y in _pairs(a, b):
        if len(x) != len(y):
            raise ValueError(f"paired arms need the same seeds: {len(x)} and {len(y)}")
        both = np.isfinite(x) & np.isfinite(y)
        differences.append(np.where(both, x - y, np.nan))
        if both.sum() > 1 and not is_constant(x[both]) and not is_constant(y[both]):
            correlations.append(float(np.corrcoef(x[both], y[both])[0, 1]))
    correlation = float(np.mean(correlations)) if correlations else NAN
    return _from_interval("paired t", seed_t(differences, level=level), correlation)


def against_constant(a: Values, constants: Values, *, level: float = 0.95) -> Comparison:
    """One-sample t test against an arm without seed variance (a deterministic inference-time method).

    Args:
        a: (S,) seed values, or R arrays of them.
        constants: the other arm's one value, or one per reward.
        level: coverage of the interval.
    """
    fixed = np.asarray(constants, dtype=np.float64).ravel()
    shifted = [values - constant for values, constant in zip(strata(a), fixed, strict=True)]
    return _from_interval("one-sample t", seed_t(shifted, level=level))


def permutation(a: Values, b: Values, *, level: float = 0.95) -> Comparison:
    """Exact permutation test: seeds are relabelled within each reward (Fisher 1935).

    The statistic is the mean over rewards of the difference of means (Welch's t for a single reward with unequal
    seed counts); p is the share of relabellings at least as far from zero, the observed one included. All
    prod_r C(S_ar + S_br, S_ar) relabellings are counted by splitting the rewards into two halves: with the sums of
    one half sorted, a binary search per sum of the other half counts every pair, so that four rewards with five
    seeds each (4e9 relabellings) are still exact. Larger designs use 99 999 random relabellings from a stream seeded
    by the data, p = (count + 1) / (draws + 1) (Phipson and Smyth 2010).

    The interval shown beside it is Welch's.
    """
    reference = welch(a, b, level=level)
    pairs = [(np.sort(present(x)), np.sort(present(y))) for x, y in _pairs(a, b)]
    name = "permutation" if len(pairs) == 1 else "stratified permutation"
    if any(len(x) == 0 or len(y) == 0 for x, y in pairs):
        return Comparison(name, reference.interval, NAN, 1.0, note=reference.note)
    balanced = all(len(x) == len(y) for x, y in pairs)
    studentised = len(pairs) == 1 and not balanced and min(map(len, pairs[0])) > 1
    sizes = [math.comb(len(x) + len(y), len(x)) for x, y in pairs]
    total = math.prod(sizes)
    halves = _halve(sizes)
    exact = max(math.prod(sizes[i] for i in half) for half in halves) <= EXACT_LIMIT

    def statistics(i: int, chosen: NDArray[np.intp]) -> Array:
        pooled = np.concatenate(pairs[i])
        return _differences(pooled - pooled.mean(), chosen, studentised)

    observed = sum(float(statistics(i, np.arange(len(x))[None])[0]) for i, (x, _) in enumerate(pairs))
    # Relabellings that tie with the observed one in exact arithmetic differ from it by rounding.
    slack = 1e-10 * max(float(np.ptp(np.concatenate(pair))) for pair in pairs) if not studentised else 1e-10
    if exact:
        first, second = (
            _sums([statistics(i, _splits(sum(map(len, pairs[i])), len(pairs[i][0]))) for i in half]) for half in halves
        )
        p = min(1.0, _count_beyond(first, second, abs(observed) - slack) / total)
        # Swapping the two arms everywhere gives the same distance, if they have as many seeds.
        smallest = (2 if balanced else 1) / total
    else:
        draws = _draws(pairs, statistics)
        p = (int((np.abs(draws) >= abs(observed) - slack).sum()) + 1) / (MONTE_CARLO_DRAWS + 1)
        smallest = 1 / (MONTE_CARLO_DRAWS + 1)
    unequal = "" if balanced or studentised else "unequal seed counts: permuted difference of means"
    return Comparison(name, reference.interval, p, smallest, total, exact, note=join(reference.note, unequal))


def correlation_over_strata(pairs: Sequence[tuple[Sequence[ArrayLike], Sequence[ArrayLike]]]) -> float:
    """How alike a seed's luck is on different rewards, which the stratified tests take to be independent.

    Mean Pearson correlation, over seeds, of the difference of two arms on one reward with that on another; over all
    pairs of rewards and all pairs of arms. For description only: from five seeds it is rough.

    Args:
        pairs: for each pair of arms the (S,) seed values of both by reward; the same position is the same seed.

    Returns:
        NaN where no two rewards have three common seeds and a spread.
    """
    found = []
    for a, b in pairs:
        gaps = [x - y for x, y in _pairs(a, b) if len(x) == len(y)]
        for x, y in itertools.combinations(gaps, 2):
            both = np.isfinite(x) & np.isfinite(y) if len(x) == len(y) else np.zeros(0, dtype=bool)
            if both.sum() > 2 and not is_constant(x[both]) and not is_constant(y[both]):
                found.append(float(np.corrcoef(x[both], y[both])[0, 1]))
    return float(np.mean(found)) if found else NAN


def _pairs(a: Values, b: Values) -> list[tuple[Array, Array]]:
    """The arms' seed values reward by reward."""
    first, second = strata(a), strata(b)
    if len(first) != len(second) or not first:
        raise ValueError(f"both arms need the same rewards: {len(first)} and {len(second)}")
    return list(zip(first, second, strict=True))


def _halve(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split the strata so that both halves have about as many combinations."""
    halves: tuple[list[int], list[int]] = ([], [])
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(halves, key=lambda half: math.prod(sizes[j] for j in half)).append(i)
    return halves


@functools.lru_cache(maxsize=8)
def _splits(n: int, k: int) -> NDArray[np.intp]:
    """(C(n, k), k): every choice of k of n positions."""
    flat = itertools.chain.from_iterable(itertools.combinations(range(n), k))
    return np.fromiter(flat, dtype=np.intp, count=math.comb(n, k) * k).reshape(-1, k)


def _differences(centred: Array, chosen: NDArray[np.intp], studentised: bool) -> Array:
    """Difference of means (or Welch's t) between chosen and other positions, per row of ``chosen``; mean zero in."""
    k, other = chosen.shape[1], len(centred) - chosen.shape[1]
    picked = centred[chosen]
    mean_a = picked.mean(axis=1)
    mean_b = -mean_a * k / other
    difference = np.asarray(mean_a - mean_b, dtype=np.float64)
    if not studentised:
        return difference
    squares = (picked**2).sum(axis=1)
    var_a = np.maximum(squares - k * mean_a**2, 0) / (k - 1)
    var_b = np.maximum((centred**2).sum() - squares - other * mean_b**2, 0) / (other - 1)
    error = np.sqrt(var_a / k + var_b / other)
    # No spread on either side: as far apart as can be, unless there is no difference either.
    farthest = np.where(difference == 0, 0.0, np.copysign(1e300, difference))
    return np.asarray(np.divide(difference, error, out=farthest, where=error > 0), dtype=np.float64)


def _sums(statistics: Sequence[Array]) -> Array:
    """All sums that take one statistic from every stratum."""
    return functools.reduce(lambda x, y: np.add.outer(x, y).ravel(), statistics, np.zeros(1))


def _count_beyond(first: Array, second: Array, distance: float) -> int:
    """How many pairs have |x + y| >= distance."""
    # Both are sorted: neighbouring needles are found in neighbouring places, which is several times faster.
    ordered, others = sorted((np.sort(first), np.sort(second)), key=len)
    above = len(ordered) * len(others) - int(np.searchsorted(ordered, distance - others, side="left").sum())
    below = int(np.searchsorted(ordered, -distance - others, side="right").sum())
    return above + below


def _draws(pairs: Sequence[tuple[Array, Array]], statistics: Callable[[int, NDArray[np.intp]], Array]) -> Array:
    """Statistics of random relabellings."""
    rng = content_rng([group for pair in pairs for group in pair])
    total = np.zeros(MONTE_CARLO_DRAWS)
    for i, (x, y) in enumerate(pairs):
        keys = rng.random((MONTE_CARLO_DRAWS, len(x) + len(y)))
        total += statistics(i, np.argsort(keys, axis=1)[:, : len(x)])
    return total
