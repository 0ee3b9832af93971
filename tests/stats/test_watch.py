"""The over-optimisation watch: closed forms, invariances, and short simulations of its level and power."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from harness.stats.watch import sign_flips, watch
from tests.calibration.watching import NULLS, Story, false_alarms, first_alarms

RISING = np.arange(4.0)[:, None]


def rising(points: int, prompts: int) -> np.ndarray:
    """A training reward that gains one at each point, on every prompt."""
    return np.arange(points + 1.0)[:, None] + np.zeros(prompts)


def test_the_statistic_is_a_function_of_students_t() -> None:
    """It is sqrt(n) t / sqrt(n - 1 + t^2), checked against scipy for the only pair of points there is."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(1.5, 1, 20), rng.normal(0, 1, 20)])
    (fall,) = watch(rising(1, 20), {"twin": values}).falls
    t = float(stats.ttest_rel(values[0], values[1]).statistic)
    assert fall.statistic == pytest.approx(np.sqrt(20) * t / np.sqrt(19 + t**2))
    assert fall.fall == pytest.approx((values[0] - values[1]).mean())
    assert fall.standard_error == pytest.approx(stats.sem(values[0] - values[1]))
    assert (fall.point, fall.since, fall.rise, fall.prompts) == (1, 0, 1.0, 20)


@pytest.mark.parametrize("prompts", [4, 5, 8])
def test_one_look_at_one_witness_is_the_exact_sign_flip_test(prompts: int) -> None:
    """With two points it warns where the one-sided p over all sign patterns, counted here by hand, is at most 5 %."""
    rng, warned = np.random.default_rng(prompts), []
    for _ in range(60):
        change = rng.normal(0.7, 1, prompts)
        signs = np.array(list(itertools.product([1, -1], repeat=prompts)))
        p = np.mean(signs @ change >= change.sum() - 1e-12)
        seen = watch(rising(1, prompts), {"twin": np.stack([change, np.zeros(prompts)])})
        assert bool(seen.falls) == (p <= 0.05), (p, seen)
        warned.append(bool(seen.falls))
    assert any(warned) == (prompts > 4)  # four prompts have 16 patterns: the smallest p is 1/16
    assert not all(warned)


def test_a_fall_that_no_prompt_contradicts_is_seen_with_five_prompts_and_not_with_four() -> None:
    """Constant falls have no spread, which is no obstacle; with four prompts nothing can be shown, and it says so."""
    down = np.array([0.0, -1.0])[:, None]
    seen = watch(rising(1, 5), {"twin": down + np.zeros(5)})
    (fall,) = seen.falls
    assert (fall.fall, fall.standard_error) == (1.0, 0.0)
    few = watch(rising(1, 4), {"twin": down + np.zeros(4)})
    assert not few.falls
    assert np.isinf(few.critical).all()


def test_the_best_earlier_point_is_what_a_fall_is_measured_from() -> None:
    """A witness that rises, peaks and falls: the fall is from the peak, and each later point is warned of."""
    noise = np.random.default_rng(1).normal(0, 0.1, (5, 12))
    path = np.array([0.0, 1.0, 2.0, 1.0, 0.5])[:, None] + noise
    seen = watch(rising(4, 12), {"twin": path})
    assert [(fall.point, fall.since) for fall in seen.falls] == [(3, 2), (4, 2)]
    assert seen.first["twin"].point == 3
    assert seen.falls[0].fall == pytest.approx((path[2] - path[3]).mean())


def test_without_a_rise_of_the_training_reward_there_is_no_over_optimisation() -> None:
    """A collapse takes both down; only points after which the training reward rose are compared with."""
    path = np.array([0.0, 2.0, 1.0])[:, None] + np.random.default_rng(2).normal(0, 0.1, (3, 12))
    collapse = np.array([0.0, 2.0, 1.0])[:, None] + np.zeros(12)
    assert not watch(collapse, {"twin": path}).falls
    up = np.array([0.0, 1.0, 1.5])[:, None] + np.zeros(12)
    assert [fall.since for fall in watch(up, {"twin": path}).falls] == [1]
    partly = np.array([1.0, 2.0, 1.5])[:, None] + np.zeros(12)
    assert not watch(partly, {"twin": path - np.array([0.0, 0.0, 0.0])[:, None]}).falls  # rose since 0, fell since 1


def test_a_look_does_not_depend_on_what_comes_later() -> None:
    """The watch of a running cell and of its finished records agree at every point."""
    rng = np.random.default_rng(3)
    twin, gold = rng.normal(0, 1, (5, 10)).cumsum(0), rng.normal(0, 1, (5, 10)).cumsum(0)
    whole = watch(rising(4, 10), {"twin": twin, "gold": gold}, 6)
    for now in range(1, 5):
        part = watch(rising(now, 10), {"twin": twin[: now + 1], "gold": gold[: now + 1]}, 6)
        assert part.critical == whole.critical[:now]
        assert part.falls == tuple(fall for fall in whole.falls if fall.point <= now)


def test_scale_shift_and_missing_values_of_a_witness() -> None:
    """Units do not matter, nor a prompt's own level; a prompt without a value counts nothing."""
    rng = np.random.default_rng(4)
    twin = rng.normal(0, 1, (4, 9)).cumsum(0) - 0.8 * RISING
    seen = watch(rising(3, 9), {"twin": twin})
    assert seen.falls
    moved = watch(rising(3, 9), {"twin": 50 * twin + rng.normal(0, 100, 9)})
    assert [(f.point, f.since) for f in moved.falls] == [(f.point, f.since) for f in seen.falls]
    np.testing.assert_allclose([f.fall for f in moved.falls], [50 * f.fall for f in seen.falls])
    holes = twin.copy()
    holes[:, 3:5] = np.nan
    (first, *_) = watch(rising(3, 9), {"twin": holes}).falls
    assert first.prompts == 7
    gone = watch(rising(3, 9), {"twin": np.full((4, 9), np.nan), "gold": twin})
    assert gone.witnesses == ("gold",)
    assert [f.witness for f in gone.falls] == ["gold"] * len(gone.falls)
    assert not watch(rising(3, 9), {"twin": np.ones((4, 9))}).falls
    assert not watch(np.full((4, 9), np.nan), {"twin": twin}).falls
    assert not watch(rising(3, 9), {}).falls


def test_impossible_arguments_are_refused() -> None:
    """Witnesses on other prompts than the training reward, and more points than were planned."""
    with pytest.raises(ValueError, match="one shape"):
        watch(rising(2, 5), {"twin": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="3 points where 2 are planned"):
        watch(rising(3, 5), {"twin": np.zeros((4, 5))}, 2)


def test_sign_patterns_are_a_group_of_few_and_the_same_sample_of_many() -> None:
    """All of them up to eleven prompts, the identity among them; beyond, as many, each sign as often as the other."""
    assert len(np.unique(sign_flips(6), axis=0)) == 64
    many = sign_flips(30)
    assert many.shape == (2048, 30)
    assert (many[0] == 1).all()
    np.testing.assert_array_equal(many, sign_flips(30))
    assert abs(many[1:].mean()) < 4 / np.sqrt(many.size)
    assert not (many.sum(axis=1) == 30)[1:].any()


@pytest.mark.parametrize("story", NULLS, ids=lambda story: story.name)
def test_false_alarms_stay_within_five_percent(story: Story) -> None:
    """Where nothing falls; the whole simulation is `tests/calibration`."""
    rate = false_alarms(np.random.default_rng(7), story, 150, points=3, prompts=8)
    assert rate.value <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_what_counts_every_point_and_witness_alone_raises_false_alarms() -> None:
    """The negative control: a paired t test at each pair of points fails the same check."""
    rng, hits = np.random.default_rng(8), 0
    for _ in range(50):
        twin = rng.normal(0, 1, (4, 4, 8)).cumsum(axis=1)
        pairs = itertools.combinations(range(4), 2)
        hits += any(stats.ttest_rel(w[g], w[t], alternative="greater").pvalue < 0.05 for g, t in pairs for w in twin)
    assert hits / 50 > 0.05 + 3 * np.sqrt(0.05 * 0.95 / 50)


def test_a_fall_is_found_the_sooner_the_larger_it_is() -> None:
    """Power grows with the fall: two spreads of the prompts' changes are hardly ever missed, and one sometimes."""
    found = [first_alarms(np.random.default_rng(9), 80, fall, points=4, prompts=12) for fall in (0.0, 1.0, 2.0)]
    rates = [np.mean([point is not None for point in points]) for points in found]
    assert rates[0] < 0.15
    assert 0.3 < rates[1] < 0.6
    assert rates[2] > 0.95
