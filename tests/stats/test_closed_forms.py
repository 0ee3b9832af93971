"""Formulas against hand calculation, limits and other libraries."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower

from harness.stats.bootstrap import bootstrap
from harness.stats.comparisons import against_constant, correlation_over_strata, permutation, welch
from harness.stats.curves import band, log_auc, time_to_threshold
from harness.stats.effects import best_of_n_equivalent, gain, hedges_g, probability_better, standardised
from harness.stats.intervals import bonferroni, clopper_pearson, crossed, crossed_difference, seed_t
from harness.stats.matrix import generalisation, reward_correlations, transfer_ratio
from harness.stats.power import (
    detectable_difference,
    minimum_detectable_difference,
    pilot_inflation,
    seeds_needed,
)
from harness.stats.seed_means import base_sd, seed_scores


def test_crossed_standard_error_by_hand() -> None:
    """The variance is (MS_seeds + MS_prompts - MS_interaction) / (S P) of the two-way analysis of variance."""
    x = np.array([[1.0, 4.0, 2.0], [3.0, 5.0, 7.0]])
    s, p = x.shape
    rows, columns, grand = x.mean(axis=1), x.mean(axis=0), x.mean()
    ms_seeds = p * ((rows - grand) ** 2).sum() / (s - 1)
    ms_prompts = s * ((columns - grand) ** 2).sum() / (p - 1)
    ms_rest = sum((x[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(s) for j in range(p)) / (
        (s - 1) * (p - 1)
    )
    terms = np.array([ms_seeds, ms_prompts, -ms_rest]) / (s * p)
    df = terms.sum() ** 2 / (terms**2 / [s - 1, p - 1, (s - 1) * (p - 1)]).sum()
    result = crossed(x)
    assert result.standard_error == pytest.approx(math.sqrt(terms.sum()))
    assert result.df == pytest.approx(df)
    assert result.half_width == pytest.approx(stats.t.ppf(0.975, df) * math.sqrt(terms.sum()))


def test_crossed_difference_by_hand() -> None:
    """The variance of a difference adds both arms' seeds and the prompts, and subtracts the interactions."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(3, 6)) + rng.normal(size=(3, 1)) + 3 * rng.normal(size=6)
    b = rng.normal(size=(4, 6)) + rng.normal(size=(4, 1)) + 3 * rng.normal(size=6)
    v_a, v_b = a.mean(1).var(ddof=1) / 3, b.mean(1).var(ddof=1) / 4
    v_p = (a.mean(0) - b.mean(0)).var(ddof=1) / 6

    def rest(x: np.ndarray) -> float:
        left = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
        return float((left**2).sum() / ((len(x) - 1) * 5) / x.size)

    result = crossed_difference(a, b)
    assert result.standard_error**2 == pytest.approx(v_a + v_b + v_p - rest(a) - rest(b))
    assert result.n == 3


def test_correlation_of_a_seeds_rewards() -> None:
    """Differences of arms are correlated over seeds, reward by reward; seeds without a value on both are left out."""
    rng = np.random.default_rng(3)
    luck, b = rng.normal(size=6), rng.normal(size=(3, 6))
    a = b + np.array([luck, 2 * luck + 1, -luck])
    assert correlation_over_strata([(list(a), list(b))]) == pytest.approx((1 - 1 - 1) / 3)
    noise = rng.normal(size=(2, 6))
    noise[0, 1] = np.nan
    kept = [0, 2, 3, 4, 5]
    expected = np.corrcoef(noise[0, kept], noise[1, kept])[0, 1]
    assert correlation_over_strata([(list(noise), [np.zeros(6)] * 2)]) == pytest.approx(expected)


def test_correlation_of_rewards_needs_three_seeds_and_two_rewards() -> None:
    """Where there is nothing to correlate the answer is not a number."""
    assert math.isnan(correlation_over_strata([([[1.0, 2.0], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]])]))
    assert math.isnan(correlation_over_strata([([[1.0, 2.0, 4.0]], [[0.0, 0.0, 0.0]])]))


def test_crossed_falls_back_to_the_seeds() -> None:
    """Where prompts add less than nothing by chance, the variance is that of the seeds alone."""
    x = np.array([[1.0, 2.0], [3.0, 1.0], [5.0, 6.0], [4.0, 3.0]])
    assert crossed(x).standard_error == pytest.approx(seed_t(x.mean(axis=1)).standard_error)


def test_stratified_t_is_welch_with_fixed_weights() -> None:
    """Two strata combine like Welch's two samples, up to sign and the factor one half."""
    a, b = [1.0, 2.0, 4.0], [3.0, 3.5, 7.0, 9.0]
    pooled, difference = seed_t([a, b]), welch(a, -np.array(b)).interval
    assert (2 * pooled.low, 2 * pooled.high) == pytest.approx((difference.low, difference.high))


def test_newcombe_at_the_ends() -> None:
    """At complete separation the interval ends at 0 or 1 and still has a width, for one reward and for several."""
    for seeds, low in ((3, 0.501), (5, 0.643)):
        up = probability_better(np.ones(seeds), np.zeros(seeds))
        down = probability_better(np.zeros(seeds), np.ones(seeds))
        assert (up.estimate, up.high, down.low) == (1.0, 1.0, 0.0)
        assert up.low == pytest.approx(low, abs=1e-3)
        assert down.high == pytest.approx(1 - low, abs=1e-3)
    several = probability_better(np.ones((4, 5)), np.zeros((4, 5)))
    assert 0.643 < several.low < several.high == 1.0


def test_probability_against_a_constant_is_wilson() -> None:
    """Against a deterministic arm the interval is Wilson's for a binomial rate."""
    result = probability_better([1.0, 2.0, 3.0, 4.0, -1.0], [0.0], b_fixed=True)
    wilson = stats.binomtest(4, 5).proportion_ci(method="wilson")
    assert (result.estimate, result.low, result.high) == pytest.approx((0.8, wilson.low, wilson.high), abs=1e-7)


def test_hedges_g_ignores_the_sign_of_spread() -> None:
    """Two arms one pooled SD apart have the exact small-sample correction as g."""
    a, b = np.array([1.0, 3.0]), np.array([1.0, 3.0]) + math.sqrt(2)
    assert hedges_g(b, a) == pytest.approx(math.gamma(1) / (math.gamma(0.5) * 1.0))


def test_best_of_n_of_normal_rewards() -> None:
    """For a normal reward a gain of 1.03 SD is worth the best of four, 1.77 the best of 16."""
    quantiles = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    base = seed_scores(quantiles, seed=np.zeros(2000), prompt=np.zeros(2000), picture=np.arange(2000))
    assert best_of_n_equivalent(base, 1.02) == 4
    assert best_of_n_equivalent(base, 1.76) == 16
    assert best_of_n_equivalent(base, -0.5) == 1
    assert best_of_n_equivalent(base, 9.0) == math.inf


def test_base_sd_pools_within_prompts() -> None:
    """Prompts of different difficulty do not widen the unit of standardised gains."""
    scores = [0.0, 2.0, 10.0, 12.0, 14.0]
    base = seed_scores(scores, seed=[0] * 5, prompt=[0, 0, 1, 1, 1], picture=[0, 1, 0, 1, 2])
    assert base_sd(base) == pytest.approx(math.sqrt((2 + 8) / 3))
    assert standardised([1.0], base_sd(base)) == pytest.approx([1 / math.sqrt(10 / 3)])


def test_gain_pairs_pictures_by_identity() -> None:
    """A gain compares the same prompt and latent, whatever the order, and lacks what the base lacks."""
    tuned = seed_scores([5.0, 7.0, 9.0], seed=[3, 3, 3], prompt=["a", "a", "b"], picture=[0, 1, 0])
    base = seed_scores([4.0, 1.0], seed=[0, 0], prompt=["a", "a"], picture=[1, 0])
    result = gain(tuned, base)
    np.testing.assert_allclose(result.cells, [[3.5, np.nan]])
    assert result.prompts_scored == 1


@pytest.mark.parametrize("seeds", [3, 5, 6, 8, 10, 20])
@pytest.mark.parametrize("family", [1, 6, 15])
def test_detectable_difference_agrees_with_statsmodels(seeds: int, family: int) -> None:
    """The smallest detectable difference has the power that statsmodels computes for it."""
    alpha = 0.05 / family
    ours = minimum_detectable_difference(seeds, alpha=alpha)
    assert TTestIndPower().power(ours, seeds, alpha) == pytest.approx(0.8, abs=1e-6)
    ours = minimum_detectable_difference(seeds, alpha=alpha, design="paired")
    assert TTestPower().power(ours, seeds, alpha) == pytest.approx(0.8, abs=1e-6)


def test_detectable_difference_at_two_seeds() -> None:
    """Two seeds need huge differences, also where a solver with a fixed bracket returns its end."""
    values = [minimum_detectable_difference(2, alpha=0.05 / m) for m in (6, 15)]
    assert values == pytest.approx([13.89, 21.97], abs=0.01)
    assert math.isfinite(minimum_detectable_difference(2, alpha=1e-4, design="paired"))


def test_margin_of_non_inferiority() -> None:
    """One-sided designs give the known margins for 80 % power."""
    ours = [minimum_detectable_difference(s, sides=1) for s in (3, 5, 10)]
    assert ours == pytest.approx([2.48, 1.72, 1.16], abs=0.005)


def test_detectable_difference_of_an_interval() -> None:
    """From an observed interval it is the standard error times the noncentrality of its t test."""
    interval = welch([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]).interval
    sd = np.std([0.0, 1.0, 2.0, 3.0], ddof=1)
    assert detectable_difference(interval) == pytest.approx(minimum_detectable_difference(4) * sd)


@pytest.mark.parametrize("difference", [0.3, 0.8, 1.5, 3.1])
def test_seeds_needed_is_the_smallest_number(difference: float) -> None:
    """The number of seeds detects the difference, and one seed fewer does not."""
    seeds = seeds_needed(difference, 1.0)
    assert seeds is not None
    assert minimum_detectable_difference(seeds) <= difference < minimum_detectable_difference(seeds - 1)
    assert seeds_needed(1e-6, 1.0) is None
    assert seeds_needed(20.0, 1.0) == 2


def test_pilot_inflation() -> None:
    """Pilot SDs are inflated by the chi-square factor."""
    assert [pilot_inflation(s) for s in (3, 5, 10)] == pytest.approx([2.12, 1.56, 1.29], abs=0.006)


def test_fieller_approaches_the_delta_method() -> None:
    """For a specialist's gain far from zero Fieller's interval is that of the delta method."""
    noise = np.array([-1.0, -0.5, 0.0, 0.5, 1.0]) * 1e-3
    result = transfer_ratio(5 + noise, 10 + noise)
    v = noise.var(ddof=1) / 5
    error = math.sqrt(v + 0.25 * v) / 10
    df = (v + 0.25 * v) ** 2 / (v**2 / 4 + (0.25 * v) ** 2 / 4)
    assert result.estimate == pytest.approx(0.5)
    assert result.half_width == pytest.approx(stats.t.ppf(0.975, df) * error, rel=1e-4)


def test_fieller_bounds_solve_their_equation() -> None:
    """At both bounds the squared difference is t^2 times its variance."""
    a, b = np.array([1.0, 2.0, 1.5, 1.2]), np.array([3.0, 4.0, 3.2, 4.4])
    result = transfer_ratio(a, b)
    va, vb = a.var(ddof=1) / 4, b.var(ddof=1) / 4
    ratios = [abs(a.mean() - r * b.mean()) / math.sqrt(va + r * r * vb) for r in (result.low, result.high)]
    assert ratios[0] == pytest.approx(ratios[1])
    assert result.low < result.estimate < result.high


def test_clopper_pearson_of_no_event() -> None:
    """No collapse in five runs still allows 52 %."""
    result = clopper_pearson(0, 5)
    assert (result.estimate, result.low) == (0.0, 0.0)
    assert result.high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_bonferroni_level() -> None:
    """Five intervals at 99 % hold together at 95 %."""
    assert bonferroni(0.95, 5) == pytest.approx(0.99)


def test_enumerated_bootstrap_is_exact() -> None:
    """With enumeration the bounds are quantiles of all S^S equally likely resamples, and never vary."""
    x = np.array([0.0, 1.0, 4.0])
    means = sorted(np.mean(x[list(i)]) for i in np.ndindex(3, 3, 3))
    result = bootstrap([x], np.mean, level=0.6)
    assert (result.low, result.high) == pytest.approx((means[5], means[-6]))
    assert result == bootstrap([x[::-1]], np.mean, level=0.6)
    assert "enumerated" in result.note


def test_one_sample_test() -> None:
    """Against a constant the test is scipy's one-sample t."""
    x = np.array([1.0, 2.0, 4.0])
    assert against_constant(x, [1.5]).p == pytest.approx(stats.ttest_1samp(x, 1.5).pvalue)


@pytest.mark.parametrize(("seeds", "smallest"), [(3, 0.1), (4, 2 / 70), (5, 2 / 252), (8, 2 / 12870)])
def test_smallest_attainable_p(seeds: int, smallest: float) -> None:
    """Complete separation attains the smallest p of the design, and nothing can go below."""
    result = permutation(np.arange(seeds) + 100.0, np.arange(seeds))
    assert result.p == pytest.approx(smallest)
    assert result.smallest_p == pytest.approx(smallest)


def test_permutation_with_unequal_counts_is_studentised() -> None:
    """With unequal counts the exact test of one reward ranks relabellings by Welch's t."""
    a, b = np.array([0.0, 5.0, 1.0]), np.array([2.0, 2.1, 2.3, 2.2, 2.6])
    oracle = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.abs(stats.ttest_ind(x, y, axis=axis, equal_var=False).statistic),
        alternative="greater",
        n_resamples=np.inf,
    )
    assert permutation(a, b).p == pytest.approx(oracle.pvalue)


def test_large_designs_are_sampled_from_a_stream_of_their_own() -> None:
    """Above the limit of enumeration the p value is close to Welch's and the same in every call."""
    rng = np.random.default_rng(3)
    a, b = list(rng.normal(size=(3, 12)) + 0.3), list(rng.normal(size=(3, 12)))
    result = permutation(a, b)
    assert not result.exact
    assert result.p == permutation(a, b).p
    assert result.p == pytest.approx(welch(a, b).p, abs=0.02)
    assert result.smallest_p == 1e-5


def test_curves() -> None:
    """A constant curve has its height as area, and one linear in log queries its middle."""
    queries = [0, 10, 100, 1000]
    flat, rising = [0, 2, 2, 2], [0, 1, 2, 3]
    assert log_auc(queries, [flat, rising]) == pytest.approx([2.0, 2.0])
    points = band([flat, rising, [0, 3, 2, 1]])
    assert points[1].estimate == pytest.approx(2.0)
    assert points[0].note.startswith("identical")


def test_time_to_threshold_is_censored() -> None:
    """A seed that never arrives counts with the budget and is not counted as having reached it."""
    result = time_to_threshold([0, 10, 100], [[0, 1, 2], [0, 0.2, 0.4], [0, 0.1, 1]], 0.9)
    assert result.times.tolist() == [10, 100, 100]
    assert (result.reached, result.n) == (2, 3)
    assert result.interval.estimate == pytest.approx(70)


def test_generalisation_summaries() -> None:
    """Summaries are computed within runs first, so that the gap's error respects shared runs."""
    rng = np.random.default_rng(5)
    shared = rng.normal(size=(2, 1, 5))
    gains = np.array([[3.0, 1.0, -2.0], [0.5, 4.0, 1.0]])[:, :, None] + shared + 0.01 * rng.normal(size=(2, 3, 5))
    result = generalisation(gains, ["x", "y"], ["x", "y", "held-out"])
    assert result.on_target.estimate == pytest.approx((gains[0, 0].mean() + gains[1, 1].mean()) / 2)
    assert result.gap.estimate == pytest.approx(result.on_target.estimate - result.off_target.estimate)
    assert result.gap.standard_error < 0.05 * result.on_target.standard_error
    assert result.worst == ("x", "held-out")
    assert np.isnan(result.adjusted_p[0, 0])
    assert result.harmed == int(result.adjusted_p[0, 2] < 0.05)


def test_reward_correlations() -> None:
    """Correlations use the pictures that both rewards score."""
    x = np.array([1.0, 2.0, 3.0, 4.0, 9.0])
    y = np.array([2.0, 4.0, 6.0, 8.0, np.nan])
    assert reward_correlations([x, y, -x]) == pytest.approx(np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]]))
