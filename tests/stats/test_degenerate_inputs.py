"""Too little, broken or constant data: a stated result, never a traceback and never a silent zero."""

import math

import numpy as np
import pytest

from harness.stats.bootstrap import bootstrap
from harness.stats.comparisons import Comparison, against_constant, paired, permutation, welch
from harness.stats.curves import band, log_auc, time_to_threshold
from harness.stats.effects import best_of_n_equivalent, hedges_g, probability_better, standardised
from harness.stats.gate import GateOutcome, gate
from harness.stats.intervals import Interval, clopper_pearson, crossed, crossed_difference, seed_t
from harness.stats.matrix import generalisation, transfer_ratio
from harness.stats.multiplicity import benjamini_hochberg, holm
from harness.stats.power import detectable_difference, minimum_detectable_difference, pilot_inflation, seeds_needed
from harness.stats.seed_means import base_sd, intention_to_treat, seed_scores, strata

NAN = math.nan
pytestmark = pytest.mark.filterwarnings("error")


def stated(interval: Interval, reason: str) -> None:
    """Assert that there is no interval and that the note says why."""
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert reason in interval.note
    assert not interval.excludes(0.0)
    assert math.isnan(interval.p_value())


def untested(comparison: Comparison) -> None:
    """Assert that there is no p value and that the note says why."""
    assert math.isnan(comparison.p)
    assert comparison.note


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "no data"),
        ([NAN, NAN], "no data"),
        ([1.0], "n=1"),
        ([0.1, 0.1, 0.1], "identical"),
        ([[1.0, 2.0], [3.0]], "n=1"),
        ([[1.0, 2.0], [NAN, NAN]], "no data"),
        ([[1.0, 1.0], [3.0, 3.0]], "identical"),
    ],
)
def test_no_interval_for_a_mean(values: list, reason: str) -> None:
    """One seed, no seed and identical seeds have no interval, alone or within a stratum."""
    stated(seed_t(values), reason)


def test_two_seeds_are_flagged() -> None:
    """Two seeds have an interval, and it says how little it is worth."""
    result = seed_t([1.0, 2.0])
    assert result.half_width == pytest.approx(12.706 / 2, abs=1e-3)
    assert "n=2" in result.note


def test_missing_seeds_are_left_out_and_stated() -> None:
    """A missing seed does not count as zero, and the note says that it is missing."""
    result = seed_t([1.0, NAN, 2.0, 3.0])
    assert (result.estimate, result.n) == (2.0, 3)
    assert "1 seed values missing" in result.note
    assert welch([1.0, 2.0, NAN], [1.0, 3.0, 5.0, 6.0]).interval.n == 2


@pytest.mark.parametrize("test", [welch, paired])
def test_undefined_t_tests(test: object) -> None:
    """Constant arms, single seeds and missing arms leave the t tests undefined."""
    for a, b in (([1.0, 1.0], [2.0, 2.0]), ([1.0], [2.0]), ([NAN, NAN], [1.0, 2.0]), ([], [])):
        untested(test(a, b))


def test_permutation_of_degenerate_arms() -> None:
    """The permutation test needs no variance, says 1 for equal arms and nothing for empty ones."""
    assert permutation([1.0] * 3, [1.0] * 3).p == 1.0
    assert permutation([2.0] * 5, [1.0] * 5).p == pytest.approx(2 / 252)
    assert permutation([2.0] * 5, [1.0] * 4).p == pytest.approx(1 / 126)
    assert permutation([1.0], [2.0]).smallest_p == 1.0
    assert permutation([1.0, 2.0, 2.0], [1.0]).p <= 1.0
    untested(permutation([NAN], [1.0, 2.0]))


def test_ties_in_the_permutation_test() -> None:
    """Relabellings that tie with the data in exact arithmetic are counted, despite rounding."""
    assert permutation([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]).p == 1.0
    assert permutation([0.1, 0.3], [0.2, 0.2]).p == 1.0


def test_a_constant_arm_against_a_constant_value() -> None:
    """One-sample tests of identical or single seeds are undefined."""
    untested(against_constant([1.0, 1.0], [0.0]))
    untested(against_constant([1.0], [0.0]))


def test_different_rewards_or_seeds_are_refused() -> None:
    """Wrong use raises an error that names the numbers, because no result could be right."""
    with pytest.raises(ValueError, match="same rewards"):
        welch([[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match="same seeds"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="status"):
        intention_to_treat([1.0], ["lost"], 0.0)


def test_crossed_intervals() -> None:
    """One seed, one prompt, missing cells and constant tables all have a stated result."""
    stated(crossed([[1.0, 2.0]]), "n=1")
    assert "one prompt" in crossed([[1.0], [2.0], [4.0]]).note
    stated(crossed(np.ones((3, 4))), "identical")
    stated(crossed(np.full((3, 4), NAN)), "no data")
    holes = np.random.default_rng(0).normal(size=(4, 5))
    holes[1, 2] = NAN
    assert "1 incomplete prompts" in crossed(holes).note
    assert "1 incomplete prompts" in crossed_difference(holes, holes[:3] + 1).note
    stated(crossed_difference(holes[:1], holes), "n=1")
    stated(crossed_difference(np.full((2, 5), NAN), holes), "no data")


def test_crossed_intervals_where_prompts_nearly_cancel() -> None:
    """Prompts that add hardly more than noise leave the degrees of freedom of the seeds, not almost none."""
    noise = np.array([[1.0, -3, 2, 2, -2], [-1, -3, 0, 2, -1], [0, 2, -3, -1, 1], [0, -2, 0, 2, 2]])
    cells = noise - np.array([0.001, 0.0, 0.0, -0.0005, 0.0])
    result = crossed(cells)
    assert result.standard_error > seed_t(cells.mean(axis=1)).standard_error
    assert result.df == 3
    assert result.half_width < 2


def test_bootstrap() -> None:
    """One seed has no bootstrap interval, and identical seeds have none of width zero."""
    stated(bootstrap([[1.0]], np.median), "n=1")
    stated(bootstrap([[2.0, 2.0, 2.0]], np.median), "identical")
    stated(bootstrap([[NAN]], np.median), "n=0")


def test_probability_better() -> None:
    """Ties count half, empty arms are stated, and two constants have no interval."""
    assert probability_better([1.0, 1.0], [1.0, 1.0]).estimate == 0.5
    stated(probability_better([NAN], [1.0]), "no data")
    stated(probability_better([1.0], [0.0], a_fixed=True, b_fixed=True), "no seed variance")


def test_effects_without_spread() -> None:
    """Without spread there is no unit to express an effect in."""
    assert math.isnan(hedges_g([1.0, 1.0], [2.0, 2.0]))
    assert math.isnan(hedges_g([1.0], [2.0]))
    assert np.isnan(standardised([1.0, 2.0], 0.0)).all()
    flat = seed_scores([3.0, 3.0], seed=[0, 0], prompt=[0, 0], picture=[0, 1])
    assert math.isnan(base_sd(flat))
    single = seed_scores([3.0, 5.0], seed=[0, 0], prompt=[0, 1], picture=[0, 0])
    assert math.isnan(base_sd(single))
    assert math.isnan(best_of_n_equivalent(single, NAN))


def test_a_reward_that_is_nan_or_infinite_is_missing() -> None:
    """Scores that are not finite are left out of the averages; a seed without any score is NaN, not zero."""
    scores = seed_scores([1.0, NAN, math.inf, NAN], seed=[0, 0, 0, 1], prompt=[0, 0, 1, 0], picture=[0, 1, 0, 0])
    np.testing.assert_array_equal(scores.means, [1.0, NAN])
    assert scores.prompts_scored == 1


def test_every_prompt_weighs_the_same() -> None:
    """A prompt with more pictures does not weigh more."""
    scores = seed_scores([0.0, 0.0, 0.0, 6.0], seed=[0] * 4, prompt=[0, 0, 0, 1], picture=[0, 1, 2, 0])
    assert scores.means.tolist() == [3.0]


def test_intention_to_treat() -> None:
    """Diverged runs keep their last score or get the fallback, crashed ones are missing, all are counted."""
    status = ["completed", "diverged", "diverged", "crashed"]
    result = intention_to_treat([2.0, 1.0, NAN, 5.0], status, 0.0)
    np.testing.assert_array_equal(result.values, [2.0, 1.0, 0.0, NAN])
    assert (result.planned, result.completed, result.diverged, result.crashed) == (4, 1, 2, 1)


def test_empty_and_undefined_families() -> None:
    """An undefined hypothesis stays undefined and still counts in the family; an empty family is empty."""
    np.testing.assert_allclose(holm([0.01, NAN, 0.02]), [0.03, NAN, 0.04])
    np.testing.assert_allclose(benjamini_hochberg([0.01, NAN, 0.02]), [0.03, NAN, 0.03])
    assert holm([]).size == benjamini_hochberg([]).size == 0


def test_power_of_degenerate_designs() -> None:
    """Designs without replication or effect have no detectable difference."""
    assert math.isnan(minimum_detectable_difference(1))
    assert math.isnan(pilot_inflation(1))
    assert math.isnan(detectable_difference(seed_t([1.0])))
    for difference, sd in ((0.0, 1.0), (NAN, 1.0), (1.0, 0.0), (1.0, NAN)):
        assert seeds_needed(difference, sd) is None


def test_rates_without_runs() -> None:
    """The rate of nothing is stated to have no data."""
    stated(clopper_pearson(0, 0), "no data")


def test_curves_that_break_off() -> None:
    """A broken curve has no area, did not reach the threshold, and leaves its later points to the other seeds."""
    curves = [[0.0, 1.0, 2.0], [0.0, 0.5, NAN], [NAN, NAN, NAN]]
    assert np.isnan(log_auc([1, 10, 100], curves)).tolist() == [False, True, True]
    with np.errstate(all="raise"):
        assert np.isnan(log_auc([16, 16], [[1.0, 2.0]])).all()
    assert np.isnan(log_auc([0, 10], [[0.0, 1.0]])).all()
    assert band(curves)[2].n == 1
    result = time_to_threshold([1, 10, 100], curves, 0.9)
    np.testing.assert_array_equal(result.times, [10, 100, NAN])
    assert (result.reached, result.n) == (1, 2)
    stated(time_to_threshold([1, 10], [[0.0, 0.1], [0.0, 0.2]], 5.0).interval, "identical")


def test_transfer_ratio_is_undefined_without_a_specialist() -> None:
    """A specialist whose gain is not separated from zero leaves the ratio undefined."""
    for specialist in ([-1.0, 1.0, 0.5], [1.0], [NAN], [2.0, 2.0, 2.0]):
        stated(transfer_ratio([1.0, 2.0, 3.0], specialist), "undefined")


def test_matrices_with_holes() -> None:
    """One seed, missing columns and missing targets leave summaries stated instead of wrong."""
    one = generalisation(np.ones((1, 2, 1)), ["x"], ["x", "y"])
    stated(one.gap, "n=1")
    holed = np.random.default_rng(0).normal(size=(2, 3, 4))
    holed[0, 2] = NAN
    result = generalisation(holed, ["x", "y"], ["x", "y", "gold"])
    assert result.off_target.estimate == pytest.approx((holed[0, 1].mean() + holed[1, [0, 2]].mean()) / 2)
    alone = generalisation(np.arange(3.0).reshape(1, 1, 3), ["x"], ["x"])
    stated(alone.off_target, "no such cells")
    assert alone.worst is None


def test_gate_of_degenerate_runs() -> None:
    """Equal numbers are identical; a constant shift or missing runs are inconclusive, never a pass or a failure."""
    assert gate([1.0, 2.0], [1.0, 2.0], 0.1).outcome is GateOutcome.IDENTICAL
    assert gate([1.0, 2.0], [2.0, 3.0], 0.1).outcome is GateOutcome.INCONCLUSIVE
    assert gate([NAN, NAN], [NAN, NAN], 0.1).outcome is GateOutcome.INCONCLUSIVE
    assert gate([1.0], [1.5], 0.1).outcome is GateOutcome.INCONCLUSIVE


def test_strata_of_every_shape() -> None:
    """One list is one reward; rows and lists of lists, also ragged ones, are several."""
    assert len(strata([1.0, 2.0])) == 1
    assert len(strata(np.zeros((3, 4)))) == 3
    assert [len(x) for x in strata([[1.0], [2.0, 3.0]])] == [1, 2]
