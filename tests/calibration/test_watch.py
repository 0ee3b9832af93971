"""The over-optimisation watch: how often it warns where nothing falls, and how soon where something does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_most, share
from tests.calibration.watching import FEW_FALL, MOST_FALL, NULLS, WITNESSES, false_alarms, first_alarms, rising

N, POINTS = 600, 4
N_LONG, MANY_POINTS = 300, 12
POWER_N = 300


def test_false_alarms(publish: Publish) -> None:
    """At most 5 % of trainings are warned of, over all points and witnesses, for few and many prompts and points."""
    rng, rows = np.random.default_rng(41), []
    for story in (*NULLS, FEW_FALL, MOST_FALL):
        designs = ((POINTS, 6, N), (POINTS, 24, N), (MANY_POINTS, 24, N_LONG))
        found = [false_alarms(rng, story, n, points=points, prompts=prompts) for points, prompts, n in designs]
        if story is not MOST_FALL:  # there the mean stays and most prompts fall, which the page says
            for rate in found:
                assert_at_most(rate, 0.05)
        rows.append([story.name, *found])
    columns = ["prompts", "4 points, 6 prompts", "4 points, 24 prompts", "12 points, 24 prompts"]
    note = f"{N} trainings ({MANY_POINTS} points: {N_LONG}), {WITNESSES} witnesses. Share with any warning."
    publish("watch", Table(columns, rows, note))


def test_single_tests_would_fail() -> None:
    """A paired t test of each witness at each pair of points warns so often that the check refuses it."""
    rng, flags = np.random.default_rng(42), []
    for _ in range(N):
        values = NULLS[0].make(rng, POINTS, 24)
        earlier, later = np.array(list(itertools.combinations(range(POINTS + 1), 2))).T
        p = stats.ttest_rel(values[:, earlier], values[:, later], axis=2, alternative="greater").pvalue
        flags.append((p < 0.05).any())
    assert share(flags).value > 0.5
    with pytest.raises(AssertionError):
        assert_at_most(share(flags), 0.05)


def test_power(publish: Publish) -> None:
    """The larger the fall and the more the prompts, the oftener it is found; with 24 prompts by one SD, and early."""
    rng, rows = np.random.default_rng(43), []
    for fall in (0.5, 1.0, 2.0, 4.0):
        found = [first_alarms(rng, POWER_N, fall, points=POINTS, prompts=prompts) for prompts in (6, 12, 24)]
        rates = [share(point is not None for point in points) for points in found]
        before = share(point is not None and point < POINTS for point in found[-1])
        rows.append([f"{fall:g}", *rates, before])
        assert rates[0].value < rates[1].value <= rates[2].value or fall > 2
        if fall >= 1:
            assert rates[2].value > 0.8
        if fall >= 4:
            assert rates[0].value > 0.8
            assert before.value > 0.8
    columns = ["fall", "6 prompts", "12 prompts", "24 prompts", "24 prompts, before the end"]
    note = f"{POWER_N} trainings each, {POINTS} points, {WITNESSES} witnesses of which one falls in their second half."
    publish("watch power", Table(columns, rows, note))


def test_the_made_up_training_reward_rises() -> None:
    """Otherwise nothing could warn, and every rate would be zero."""
    assert (np.diff(rising(POINTS, 3), axis=0) > 0).all()
