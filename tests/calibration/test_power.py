"""Planning: predicted power is found, and what a pilot study promises is kept."""

from __future__ import annotations

import numpy as np

from harness.stats.comparisons import paired, welch
from harness.stats.power import minimum_detectable_difference, pilot_inflation, seeds_needed
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_least, assert_exact, share

N = 2000


def test_detectable_differences(publish: Publish) -> None:
    """At the smallest detectable difference four of five repetitions find it; Welch's test loses .02 at most."""
    rng, rows = np.random.default_rng(17), []
    for seeds in (3, 5, 10):
        a, b = rng.normal(size=(2, N, seeds))
        pairs = list(zip(a, b, strict=True))
        plain = minimum_detectable_difference(seeds)
        family = minimum_detectable_difference(seeds, alpha=0.05 / 6)
        common = minimum_detectable_difference(seeds, design="paired") * 2**0.5
        found = [
            share(welch(x + plain, y).p < 0.05 for x, y in pairs),
            share(welch(x + family, y).p < 0.05 / 6 for x, y in pairs),
            share(paired(x + common, y).p < 0.05 for x, y in pairs),
        ]
        assert_exact(found[2], 0.8)
        if seeds >= 5:
            assert_at_least(found[0], 0.78)
        rows.append([seeds, f"{plain:.2f}", found[0], f"{family:.2f}", found[1], found[2]])
    columns = ["seeds", "detectable, SD", "power (Welch)", "detectable at .05/6, SD", "power (Welch)", "power (paired)"]
    publish("power", Table(columns, rows, f"{N} repetitions; the prediction is .80."))


def test_pilots(publish: Publish) -> None:
    """Planned with an inflated SD, four of five studies have the power that they were planned for."""
    rng, difference, rows = np.random.default_rng(18), 1.0, []
    enough = seeds_needed(difference, 1.0)
    assert enough is not None
    for seeds in (3, 5, 10):
        pilots = rng.normal(size=(N, seeds)).std(axis=1, ddof=1)
        inflation = pilot_inflation(seeds)
        large_enough = share(sd * inflation >= 1 for sd in pilots)
        planned = [[seeds_needed(difference, sd * factor) or np.inf for sd in pilots] for factor in (1.0, inflation)]
        powered = [share(n >= enough for n in plans) for plans in planned]
        assert_exact(large_enough, 0.8)
        assert_at_least(powered[1], 0.8)
        rows.append([seeds, powered[0], f"{inflation:.2f}", powered[1], f"{np.median(planned[1]):.0f}"])
    columns = [
        "seeds of the pilot",
        "enough seeds, SD as seen",
        "factor",
        "enough seeds, SD inflated",
        "median plan, seeds",
    ]
    note = f"{N} pilots, for a difference of one SD; {enough} seeds are really needed for 80 % power."
    publish("pilots", Table(columns, rows, note))
