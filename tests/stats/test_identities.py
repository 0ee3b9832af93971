"""What must hold for any data: symmetries, invariances and agreement with independent implementations."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests

from harness.stats.bootstrap import bootstrap
from harness.stats.comparisons import paired, permutation, welch
from harness.stats.effects import gain, probability_better
from harness.stats.intervals import Interval, crossed, crossed_difference, seed_t
from harness.stats.multiplicity import benjamini_hochberg, holm
from harness.stats.seed_means import SeedScores, seed_scores

FEW = settings(max_examples=40, deadline=None)
# Multiples of 1/64 are exact in binary, so that ties stay ties when constants are added.
NUMBERS = st.integers(-640, 640).map(lambda k: k / 64)


def seeds(n: int = 5) -> st.SearchStrategy[np.ndarray]:
    """Strategy: n seed means that are not all equal."""
    return arrays(np.float64, n, elements=NUMBERS).filter(lambda x: np.ptp(x) > 0)


def table(s: int = 4, p: int = 3, k: int = 2) -> st.SearchStrategy[np.ndarray]:
    """Strategy: (S, P, K) scores."""
    return arrays(np.float64, (s, p, k), elements=NUMBERS)


def rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores and identities of a (S, P, K) table as flat columns."""
    s, p, k = np.indices(values.shape)
    return values.ravel(), s.ravel(), p.ravel(), k.ravel()


def collect(values: np.ndarray) -> SeedScores:
    """Scores arranged by identity from a (S, P, K) table."""
    scores, s, p, k = rows(values)
    return seed_scores(scores, seed=s, prompt=p, picture=k)


def same(x: Interval, y: Interval, shift: float = 0.0, scale: float = 1.0) -> None:
    """Assert that y is x shifted and scaled."""
    expected = np.array([x.estimate, x.low, x.high]) * scale + shift
    np.testing.assert_allclose([y.estimate, y.low, y.high], expected, rtol=1e-9, atol=1e-9)


@FEW
@given(table())
def test_copies_of_pictures_change_nothing(values: np.ndarray) -> None:
    """Storing every picture three times must leave seed means, intervals and tests as they are."""
    columns = rows(values)
    once = seed_scores(columns[0], seed=columns[1], prompt=columns[2], picture=columns[3])
    again = [np.tile(column, 3) for column in columns]
    thrice = seed_scores(again[0], seed=again[1], prompt=again[2], picture=again[3])
    more = np.concatenate([values, values, values], axis=2)
    np.testing.assert_allclose(thrice.values, once.values, atol=1e-12)
    np.testing.assert_allclose(collect(more).means, once.means, atol=1e-12)
    if np.ptp(once.means) > 1e-6:
        same(seed_t(once.means), seed_t(collect(more).means))


@FEW
@given(table(), st.permutations(range(24)))
def test_the_order_of_rows_changes_nothing(values: np.ndarray, order: list[int]) -> None:
    """Seed means do not depend on the order in which pictures are read."""
    columns = rows(values)
    mixed = [column[order] for column in columns]
    shuffled = seed_scores(mixed[0], seed=mixed[1], prompt=mixed[2], picture=mixed[3])
    np.testing.assert_allclose(shuffled.means, collect(values).means, atol=1e-12)


@FEW
@given(table())
def test_clustered_standard_error(values: np.ndarray) -> None:
    """In balanced data the cluster-robust standard error with C/(C-1) equals ours."""
    scores = collect(values)
    assume(np.ptp(scores.means) > 1e-6)
    residuals = values - values.mean()
    clusters = len(values)
    robust = np.sqrt((residuals.sum(axis=(1, 2)) ** 2).sum() * clusters / (clusters - 1)) / values.size
    assert seed_t(scores.means).standard_error == pytest.approx(robust, rel=1e-9)


@FEW
@given(seeds(), seeds(), NUMBERS, st.sampled_from([0.5, 2.0, 8.0]))
def test_shift_and_scale(a: np.ndarray, b: np.ndarray, shift: float, scale: float) -> None:
    """Intervals follow a change of unit or origin; p values and P(better) do not notice it."""
    same(seed_t(a), seed_t(a * scale + shift), shift, scale)
    first, second = welch(a, b), welch(a * scale + shift, b * scale + shift)
    same(first.interval, second.interval, 0.0, scale)
    assert second.p == pytest.approx(first.p, rel=1e-6)
    moved = permutation(a * scale + shift, b * scale + shift)
    assert moved.p == permutation(a, b).p
    same(probability_better(a, b), probability_better(a * scale + shift, b * scale + shift))


@FEW
@given(seeds(), seeds(), st.permutations(range(5)))
def test_the_order_of_seeds_changes_nothing(a: np.ndarray, b: np.ndarray, order: list[int]) -> None:
    """Every result is the same for seeds in any order, bootstrap and permutation included."""
    same(seed_t(a), seed_t(a[order]))
    same(bootstrap([a], np.median), bootstrap([a[order]], np.median))
    assert permutation(a[order], b).p == permutation(a, b).p
    same(paired(a, b).interval, paired(a[order], b[order]).interval) if np.ptp(a - b) > 0 else None


@FEW
@given(table(s=4, p=5, k=1), table(s=3, p=5, k=1), st.permutations(range(5)), st.permutations(range(4)))
def test_the_order_of_prompts_changes_nothing(
    a: np.ndarray, b: np.ndarray, prompts: list[int], order: list[int]
) -> None:
    """Crossed intervals are the same for prompts and seeds in any order, and follow a change of unit."""
    x, y = a[:, :, 0], b[:, :, 0]
    assume(np.ptp(x.mean(axis=1)) > 1e-6)
    same(crossed(x), crossed(x[order][:, prompts]))
    same(crossed(x), crossed(2 * x + 3), 3, 2)
    same(crossed_difference(x, y), crossed_difference(x[order][:, prompts], y[:, prompts]))
    same(crossed_difference(x, y), crossed_difference(2 * x + 3, 2 * y + 3), 0, 2)


@settings(max_examples=3, deadline=None)
@given(seeds(10), st.permutations(range(10)))
def test_sampled_bootstraps_depend_on_the_numbers_alone(a: np.ndarray, order: list[int]) -> None:
    """With too many resamples to visit, seeds in any order still give the very same interval."""
    first, second = bootstrap([a], np.median), bootstrap([a[order]], np.median)
    assert "10000 resamples" in first.note
    assert (first.low, first.high) == (second.low, second.high)


@FEW
@given(seeds(4), seeds(6))
def test_exchanging_the_arms(a: np.ndarray, b: np.ndarray) -> None:
    """Exchanging the arms mirrors the interval, keeps p, and the two chances of being better add up to one."""
    forth, back = welch(a, b), welch(b, a)
    same(forth.interval, Interval(back.interval.estimate, back.interval.high, back.interval.low), 0.0, -1.0)
    assert forth.p == pytest.approx(back.p)
    assert permutation(a, b).p == pytest.approx(permutation(b, a).p)
    better, worse = probability_better(a, b), probability_better(b, a)
    assert better.estimate + worse.estimate == pytest.approx(1)
    assert better.low + worse.high == pytest.approx(1, abs=1e-6)


@FEW
@given(table(k=1), table(k=1), arrays(np.float64, 3, elements=NUMBERS))
def test_shared_prompt_effects_cancel(a: np.ndarray, b: np.ndarray, effect: np.ndarray) -> None:
    """Harder prompts for both arms leave the difference and its intervals where they were."""
    x, y = a[:, :, 0], b[:, :, 0]
    assume(np.ptp(x.mean(axis=1)) > 1e-6)
    same(welch(x.mean(1), y.mean(1)).interval, welch((x + effect).mean(1), (y + effect).mean(1)).interval)
    same(crossed_difference(x, y), crossed_difference(x + effect, y + effect))


@FEW
@given(table(s=3, p=4, k=1))
def test_crossed_intervals_contain_no_less_variance(values: np.ndarray) -> None:
    """The interval for unseen prompts has at least the standard error of the one for this suite."""
    cells = values[:, :, 0]
    assume(np.ptp(cells.mean(axis=1)) > 1e-6)
    assert crossed(cells).standard_error >= seed_t(cells.mean(axis=1)).standard_error * (1 - 1e-9)


@FEW
@given(table(), table(s=1))
def test_gain_of_the_mean_is_mean_of_the_gains(tuned: np.ndarray, base: np.ndarray) -> None:
    """With complete data the seed means of paired gains are the seed means minus the base mean."""
    gains = gain(collect(tuned), collect(base))
    np.testing.assert_allclose(gains.means, collect(tuned).means - collect(base).means[0], atol=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).map(lambda k: np.array(k) / 1000))
def test_adjusted_p_values(p: np.ndarray) -> None:
    """Holm and Benjamini-Hochberg agree with statsmodels, never fall below the raw p, and keep its order."""
    for ours, name in ((holm(p), "holm"), (benjamini_hochberg(p), "fdr_bh")):
        np.testing.assert_allclose(ours, multipletests(p, method=name)[1], rtol=1e-12)
        assert (ours >= p - 1e-15).all()
        assert (np.diff(ours[np.argsort(p)]) >= -1e-15).all()


@FEW
@given(seeds(4), seeds(4))
def test_permutation_agrees_with_scipy(a: np.ndarray, b: np.ndarray) -> None:
    """One stratum with equal counts gives the p of scipy's exhaustive permutation test."""
    oracle = stats.permutation_test((a, b), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis), vectorized=True)
    assert permutation(a, b).p == pytest.approx(oracle.pvalue)


@FEW
@given(seeds(2), seeds(2), seeds(3), seeds(2))
def test_stratified_permutation_by_brute_force(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> None:
    """Counting by halves equals visiting every relabelling of every stratum."""

    def differences(x: np.ndarray, y: np.ndarray) -> list[float]:
        pooled, every = np.concatenate([x, y]), range(len(x) + len(y))
        return [float(pooled[list(i)].mean() - np.delete(pooled, list(i)).mean()) for i in combinations(every, len(x))]

    all_of_them = [abs(sum(pick)) for pick in product(differences(a, b), differences(c, d), differences(b, a))]
    expected = np.mean(np.array(all_of_them) >= all_of_them[0] - 1e-9)
    result = permutation([a, c, b], [b, d, a])
    assert result.p == pytest.approx(expected)
    assert result.arrangements == 6 * 10 * 6
