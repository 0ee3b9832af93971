"""Frozen numbers from independent implementations (scipy, rliable 1.2.0) on one small data set."""

from math import gamma

import numpy as np
import pytest
from scipy import stats

from harness.stats.bootstrap import bootstrap
from harness.stats.comparisons import paired, permutation, welch
from harness.stats.effects import hedges_g, probability_better
from harness.stats.gate import tost
from harness.stats.intervals import seed_t
from harness.stats.multiplicity import benjamini_hochberg, holm

# Five seeds (rows) by four rewards (columns).
A = np.array(
    [
        [0.62, 1.10, 0.35, 0.81],
        [0.58, 1.32, 0.41, 0.77],
        [0.71, 0.95, 0.30, 0.92],
        [0.49, 1.21, 0.44, 0.70],
        [0.66, 1.05, 0.38, 0.85],
    ]
)
B = np.array(
    [
        [0.51, 1.02, 0.36, 0.64],
        [0.55, 0.97, 0.29, 0.71],
        [0.47, 1.15, 0.33, 0.58],
        [0.60, 0.88, 0.40, 0.69],
        [0.52, 1.08, 0.27, 0.75],
    ]
)
X, Y = A.mean(axis=1), B.mean(axis=1)


def interquartile_mean(*columns: np.ndarray) -> float:
    """Mean of the middle half of all runs and rewards together."""
    return float(np.sort(np.concatenate(columns))[5:15].mean())


def test_welch() -> None:
    """Welch's test gives the frozen t, degrees of freedom, p and interval, and agrees with scipy."""
    result = welch(X, Y)
    assert result.interval.estimate / result.interval.standard_error == pytest.approx(8.0321, abs=1e-4)
    assert result.interval.df == pytest.approx(5.5016, abs=1e-4)
    assert result.p == pytest.approx(3.0632e-4, rel=1e-4)
    assert (result.interval.low, result.interval.high) == pytest.approx((0.06369, 0.12131), abs=1e-5)
    oracle = stats.ttest_ind(X, Y, equal_var=False)
    assert result.p == pytest.approx(oracle.pvalue, rel=1e-12)
    assert result.interval.low == pytest.approx(oracle.confidence_interval().low, rel=1e-12)


def test_paired() -> None:
    """The paired test gives the frozen p and interval, and agrees with scipy."""
    result = paired(X, Y)
    assert result.p == pytest.approx(0.0017387, abs=1e-7)
    assert (result.interval.low, result.interval.high) == pytest.approx((0.0580, 0.1270), abs=5e-5)
    assert result.p == pytest.approx(stats.ttest_rel(X, Y).pvalue, rel=1e-12)
    assert result.correlation == pytest.approx(np.corrcoef(X, Y)[0, 1])


def test_seed_t_agrees_with_scipy() -> None:
    """The interval of one mean is scipy's one-sample t interval."""
    oracle = stats.ttest_1samp(X, 0).confidence_interval()
    assert (seed_t(X).low, seed_t(X).high) == pytest.approx((oracle.low, oracle.high), rel=1e-12)


def test_permutation() -> None:
    """Complete separation of five against five seeds gives the smallest p there is, 2 of 252."""
    result = permutation(X, Y)
    assert result.p == pytest.approx(2 / 252)
    assert result.smallest_p == pytest.approx(2 / 252)
    assert result.arrangements == 252
    assert result.exact


def test_two_one_sided_tests() -> None:
    """Equivalence within 0.2 gives the frozen p values and equals the larger of two one-sided scipy tests."""
    assert tost(welch(X, Y).interval, 0.2) == pytest.approx(7.0382e-5, rel=1e-4)
    assert tost(paired(X, Y).interval, 0.2) == pytest.approx(4.9082e-4, rel=1e-4)
    below = stats.ttest_ind(X, Y + 0.2, equal_var=False, alternative="less").pvalue
    above = stats.ttest_ind(X, Y - 0.2, equal_var=False, alternative="greater").pvalue
    assert tost(welch(X, Y).interval, 0.2) == pytest.approx(max(below, above), rel=1e-12)


def test_per_reward_p_values_and_their_adjustment() -> None:
    """Per-reward Welch p values and both adjustments equal the frozen ones."""
    raw = [welch(A[:, r], B[:, r]).p for r in range(4)]
    assert raw == pytest.approx([0.10307, 0.2199, 0.2095, 0.02174], abs=6e-5)
    assert holm(raw) == pytest.approx([0.30922, 0.419, 0.419, 0.08695], abs=6e-5)
    assert benjamini_hochberg(raw) == pytest.approx([0.20615, 0.2199, 0.2199, 0.08695], abs=6e-5)


def test_effect_sizes() -> None:
    """Hedges' g (frozen with the approximate correction, ours is exact) and P(better) equal the frozen ones."""
    approximate, exact = 1 - 3 / (4 * 8 - 1), gamma(4) / (2 * gamma(3.5))
    assert hedges_g(X, Y) == pytest.approx(4.5883 * exact / approximate, abs=1e-4)
    assert probability_better(list(A.T), list(B.T)).estimate == pytest.approx(0.80)
    apart = probability_better(X, Y)
    assert (apart.estimate, apart.low, apart.high) == pytest.approx((1.0, 0.643, 1.0), abs=5e-4)


@pytest.mark.parametrize(("scores", "estimate", "low", "high"), [(A, 0.711, 0.665, 0.756), (B, 0.602, 0.570, 0.633)])
def test_interquartile_mean(scores: np.ndarray, estimate: float, low: float, high: float) -> None:
    """The stratified bootstrap of the interquartile mean gives rliable's point and interval."""
    result = bootstrap(list(scores.T), interquartile_mean)
    assert result.estimate == pytest.approx(estimate, abs=6e-4)
    assert (result.low, result.high) == pytest.approx((low, high), abs=4e-3)


@pytest.mark.parametrize(("scores", "mean", "low", "high"), [(A, 0.731, 0.6935, 0.7685), (B, 0.6385, 0.6105, 0.6660)])
def test_bootstrap_of_a_mean(scores: np.ndarray, mean: float, low: float, high: float) -> None:
    """The stratified bootstrap of the mean gives rliable's point and interval."""
    result = bootstrap(list(scores.T), lambda *columns: float(np.mean(columns)))
    assert result.estimate == pytest.approx(mean, abs=1e-9)
    assert (result.low, result.high) == pytest.approx((low, high), abs=2e-3)


@pytest.mark.parametrize(("scores", "gap"), [(A, 0.303), (B, 0.374)])
def test_optimality_gap(scores: np.ndarray, gap: float) -> None:
    """What is missing to a score of one, on average, is rliable's optimality gap."""
    result = bootstrap([scores], lambda runs: float(np.maximum(1 - runs, 0).mean()))
    assert result.estimate == pytest.approx(gap, abs=6e-4)
    assert result.low < gap < result.high


def test_percentile_interval_of_the_probability_of_improvement() -> None:
    """The stratified bootstrap of P(better) gives rliable's interval; the headline's is Newcombe's."""

    def probability(*columns: np.ndarray) -> float:
        pairs = zip(columns[:4], columns[4:], strict=True)
        return float(np.mean([(np.sign(x[:, None] - y).mean() + 1) / 2 for x, y in pairs]))

    result = bootstrap([*A.T, *B.T], probability)
    assert result.estimate == pytest.approx(0.80)
    assert (result.low, result.high) == pytest.approx((0.64, 0.93), abs=0.015)


def test_percentile_bootstrap_agrees_with_scipy() -> None:
    """Visiting every resample with its probability is what many random ones approach."""
    rng = np.random.default_rng(1)
    oracle = stats.bootstrap((X,), np.mean, method="percentile", n_resamples=20_000, rng=rng).confidence_interval
    result = bootstrap([X], np.mean)
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high), abs=1.5e-3)
