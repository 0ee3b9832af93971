"""Intervals of one arm's mean."""

from __future__ import annotations

import numpy as np
import pytest

from harness.stats.bootstrap import bootstrap
from harness.stats.intervals import crossed, seed_t
from harness.stats.seed_means import Array
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_least, assert_exact, coverage
from tests.calibration.structures import SHAPES, Spread, cells, draw, with_pictures

N = 2000
ALIKE, HARD_PROMPTS, NOISY = Spread(), Spread(seed=0.3, prompt=2.0), Spread(seed=0.1, prompt=0.1)


def test_intervals_of_a_mean(publish: Publish) -> None:
    """Seed-t is exact for the suite as it is, crossed good to .02 for unseen prompts; pictures are no repetitions."""
    rng = np.random.default_rng(1)
    targets = {
        "this suite": (ALIKE, False),
        "unseen prompts": (ALIKE, True),
        "unseen, prompts differ more than seeds": (HARD_PROMPTS, True),
        "unseen, pictures differ most": (NOISY, True),
    }
    rows = []
    for target, (spread, unseen) in targets.items():
        for seeds in (3, 5, 10):
            data, truth = cells(rng, N, seeds, spread, unseen=unseen)
            pooled = coverage((seed_t(x.ravel()) for x in with_pictures(rng, data, spread)), truth)
            plain = coverage(map(seed_t, data.mean(axis=2)), truth)
            crossing = [crossed(x) for x in data]
            assert max(i.half_width for i in crossing) < 10  # in SDs: degrees of freedom do not vanish
            both = coverage(crossing, truth)
            if unseen:
                assert_at_least(both, 0.93)
            else:
                assert_exact(plain, 0.95)
            with pytest.raises(AssertionError, match="is below"):
                assert_at_least(pooled, 0.95)
            rows.append([target, seeds, plain, both, *_bootstrap(data, truth), pooled])
    columns = ["target", "seeds", "seed-t", "crossed", "percentile bootstrap", "pictures as repetitions"]
    note = f"{N} repetitions of 50 prompts with 4 pictures. The bootstrap draws at ten seeds and is left out there."
    publish("means", Table(columns, rows, note))


def _bootstrap(data: Array, truth: float) -> list[object]:
    """Coverage of the percentile bootstrap over seeds, which is below its level; none where it is slow."""
    if data.shape[1] == 10:
        return ["-"]
    rate = coverage((bootstrap([x], np.mean) for x in data.mean(axis=2)), truth)
    with pytest.raises(AssertionError, match="is below"):
        assert_at_least(rate, 0.95)
    return [rate]


def test_shapes(publish: Publish) -> None:
    """Student's t withstands heavy tails; it knows of no collapse that it has not seen."""
    rng, seeds = np.random.default_rng(2), (3, 5, 10)
    found = {shape: [coverage(map(seed_t, draw(rng, (N, s), shape)), 0.0) for s in seeds] for shape in SHAPES}
    for rate in found["normal"]:
        assert_exact(rate, 0.95)
    for rate in found["heavy tails"]:
        assert_at_least(rate, 0.95)
    for rate in found["deep collapses"]:
        with pytest.raises(AssertionError, match="is below"):
            assert_at_least(rate, 0.93)
    rows = [[shape, *rates] for shape, rates in found.items()]
    publish("shapes", Table(["distribution of seeds", *(f"S={s}" for s in seeds)], rows, f"{N} repetitions."))


def test_means_over_rewards(publish: Publish) -> None:
    """The stratified t is on the safe side, whatever the spreads of the rewards."""
    rng = np.random.default_rng(3)
    spreads = {"equal": np.ones(4), "one four times the others": np.array([1.0, 1.0, 1.0, 4.0])}
    rows = []
    for name, spread in spreads.items():
        found = [coverage(map(seed_t, rng.normal(size=(N, 4, s)) * spread[:, None]), 0.0) for s in (3, 5, 10)]
        for rate in found:
            assert_at_least(rate, 0.95)
        rows.append([name, *found])
    columns = ["spread of four rewards", "S=3", "S=5", "S=10"]
    publish("rewards", Table(columns, rows, f"{N} repetitions."))
