"""Intervals of one arm's mean."""

from __future__ import annotations

import numpy as np
import pytest

from harness.stats.bootstrap import bootstrap
from harness.stats.intervals import crossed, seed_t
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import Rate, assert_at_least, assert_exact, coverage
from tests.calibration.structures import SHAPES, Spread, cells, draw, with_pictures

N = 2000
ALIKE, HARD_PROMPTS = Spread(), Spread(seed=0.3, prompt=2.0)


def test_intervals_of_a_mean(publish: Publish) -> None:
    """Seed-t is exact for the suite as it is, crossed for unseen prompts; pictures are no repetitions."""
    rng = np.random.default_rng(1)
    designs = [(s, spread, unseen) for spread, unseen in ((ALIKE, False), (HARD_PROMPTS, True)) for s in (3, 5, 10)]
    found: dict[str, list[Rate]] = {name: [] for name in ("pooled pictures", "bootstrap", "seed-t", "crossed")}
    for seeds, spread, unseen in designs:
        data, truth = cells(rng, N, seeds, spread, unseen=unseen)
        few = 200 if seeds == 10 else N
        found["pooled pictures"].append(coverage((seed_t(x.ravel()) for x in with_pictures(rng, data, spread)), truth))
        found["bootstrap"].append(coverage((bootstrap([x], np.mean) for x in data[:few].mean(axis=2)), truth))
        found["seed-t"].append(coverage(map(seed_t, data.mean(axis=2)), truth))
        found["crossed"].append(coverage(map(crossed, data), truth))
    for suite, unseen_prompts in zip(found["seed-t"][:3], found["crossed"][3:], strict=True):
        assert_exact(suite, 0.95)
        assert_at_least(unseen_prompts, 0.93)
    for rate in found["pooled pictures"]:
        with pytest.raises(AssertionError, match="is below"):
            assert_at_least(rate, 0.93)
    publish(
        "means",
        Table(
            ["interval", *(f"S={s}, {'unseen prompts' if unseen else 'this suite'}" for s, _, unseen in designs)],
            [[name, *rates] for name, rates in found.items()],
            f"{N} repetitions (bootstrap at ten seeds: 200), 50 prompts, 4 pictures.",
        ),
    )


def test_shapes(publish: Publish) -> None:
    """Student's t withstands heavy tails, hardly skewness; no interval knows of a collapse that it has not seen."""
    rng, seeds = np.random.default_rng(2), (3, 5, 10)
    found = {shape: [coverage(map(seed_t, draw(rng, (N, s), shape)), 0.0) for s in seeds] for shape in SHAPES}
    for rate in found["normal"]:
        assert_exact(rate, 0.95)
    for rate in found["heavy tails"]:
        assert_at_least(rate, 0.95)
    for rate in found["skewed"]:
        assert_at_least(rate, 0.88)
    rows = [[shape, *rates] for shape, rates in found.items()]
    publish("shapes", Table(["seeds", *(f"S={s}" for s in seeds)], rows, f"{N} repetitions."))
