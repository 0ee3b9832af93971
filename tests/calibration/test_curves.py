"""Learning curves: bands hold point by point, times to a threshold are cut at the budget and not selected."""

from __future__ import annotations

import numpy as np
from scipy import stats

from harness.stats.comparisons import welch
from harness.stats.curves import band, log_auc, time_to_threshold
from harness.stats.intervals import bonferroni
from harness.stats.seed_means import Array
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_least, assert_exact, coverage, share

POINTS = 20


def test_bands(publish: Publish) -> None:
    """Each point of a band holds in 95 %, the whole curve in far less, and with Bonferroni's level in 95 % again."""
    rng, n, rows = np.random.default_rng(19), 1000, []
    for seeds in (3, 5, 10):
        steps = rng.normal(size=(n, seeds, POINTS))
        curves = np.empty_like(steps)
        curves[..., 0] = steps[..., 0]
        for i in range(1, POINTS):  # neighbouring points are correlated by .8
            curves[..., i] = 0.8 * curves[..., i - 1] + 0.6 * steps[..., i]
        bands = [[band(x, level=level) for x in curves] for level in (0.95, bonferroni(0.95, POINTS))]
        middle = coverage((points[POINTS // 2] for points in bands[0]), 0.0)
        whole = [share(all(i.low <= 0 <= i.high for i in points) for points in found) for found in bands]
        assert_exact(middle, 0.95)
        assert whole[0].value < 0.85
        assert_at_least(whole[1], 0.95)
        rows.append([seeds, middle, *whole])
    columns = ["seeds", "one point", "all 20 points", "all 20 points, Bonferroni"]
    publish("bands", Table(columns, rows, f"{n} repetitions; neighbouring points are correlated by .8."))


GRID = np.array([0, 16, 32, 64, 128, 256, 512, 1024, 2048], dtype=np.float64)
SPREAD = 0.7


def times(rng: np.random.Generator, size: tuple[int, ...], median: float) -> Array:
    """When each seed reaches the threshold: log-normal."""
    return np.asarray(median * np.exp(SPREAD * rng.normal(size=size)))


def rising(when: Array) -> Array:
    """(..., G) curves that reach one half at that time and one in the end."""
    return np.asarray(1 - 0.5 ** (GRID / when[..., None]))


def test_times_to_a_threshold(publish: Publish) -> None:
    """The mean cut at the budget has no bias; leaving out seeds that never arrive makes slow arms look fast.

    Its t interval is a rough one, times being skewed and heaped up at the budget: the table says how rough.
    """
    rng, n, seeds, rows = np.random.default_rng(20), 2000, 5, []
    for median in (128.0, 1024.0, 2048.0):
        found = [time_to_threshold(GRID, x, 0.5) for x in rising(times(rng, (n, seeds), median))]
        reached = stats.norm.cdf(np.log(GRID[1:] / median) / SPREAD)
        chances = np.diff(np.concatenate([[0.0], reached[:-1], [1.0]]))
        truth = float(chances @ GRID[1:])
        restricted = float(np.mean([f.interval.estimate for f in found]))
        arrived = [f.times[f.times < GRID[-1]] for f in found]
        dropped = float(np.mean([t.mean() for t in arrived if t.size]))
        error = float(np.std([f.interval.estimate for f in found]) / n**0.5)
        assert abs(restricted - truth) < 3 * error
        defined = [f.interval for f in found if np.isfinite(f.interval.low)]
        shown = [f"{x:.0f}" for x in (truth, restricted, dropped)]
        none = share(not np.isfinite(f.interval.low) for f in found)
        rows.append([f"{median:.0f}", f"{1 - reached[-1]:.2f}", *shown, coverage(defined, truth), none])
    columns = ["median", "never in budget", "true mean", "found", "found without late seeds", "coverage", "no interval"]
    note = f"{n} repetitions of {seeds} seeds; times in queries, budget {GRID[-1]:.0f}."
    publish("times", Table(columns, rows, note))


def test_the_area_sees_speed() -> None:
    """Arms that end alike and differ in speed are told apart by the area, hardly by the end."""
    rng, n, seeds = np.random.default_rng(21), 500, 5
    level = rng.normal(1, 0.1, size=(2, n, seeds, 1))
    curves = [level[i] * rising(times(rng, (n, seeds), median)) for i, median in enumerate((64.0, 160.0))]
    areas = [[log_auc(GRID, x) for x in arm] for arm in curves]
    power = share(welch(x, y).p < 0.05 for x, y in zip(*areas, strict=True))
    final = share(welch(x[:, -1], y[:, -1]).p < 0.05 for x, y in zip(*curves, strict=True))
    assert power.value > final.value + 0.3
