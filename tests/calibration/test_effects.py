"""Effect sizes: the chance to be better, gains on equal latents, and transfer from one reward to another."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.stats.effects import gain, probability_better
from harness.stats.intervals import seed_t
from harness.stats.matrix import generalisation, transfer_ratio
from harness.stats.seed_means import SeedScores
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_least, assert_at_most, assert_exact, coverage, share
from tests.calibration.structures import Shape, draw

N = 2000


def shift(shape: Shape, probability: float) -> float:
    """How far X must be moved so that it exceeds Y with this probability, both having SD one."""
    if shape == "normal":
        return float(np.sqrt(2) * stats.norm.ppf(probability))
    return float(-np.log(2 * (1 - probability)))  # exponential: P(X + d > Y) = 1 - exp(-d) / 2


def test_probability_of_being_better(publish: Publish) -> None:
    """Newcombe's interval keeps .93 from five seeds on, for one reward and for the mean of four."""
    rng, rows = np.random.default_rng(13), []
    for shape, rewards in (("normal", 1), ("normal", 4), ("skewed", 1)):
        for seeds in (3, 5, 10):
            found = []
            for probability in (0.5, 0.76, 0.92):
                a, b = draw(rng, (2, N, rewards, seeds), shape)
                moved = a + shift(shape, probability)
                intervals = [probability_better(x, y) for x, y in zip(moved, b, strict=True)]
                found.append(coverage(intervals, probability))
                if seeds > 3:
                    assert_at_least(found[-1], 0.93)
            rows.append([shape, rewards, seeds, *found])
    columns = ["seeds' distribution", "rewards", "seeds", "P=.50", "P=.76", "P=.92"]
    publish("probability", Table(columns, rows, f"{N} repetitions."))


def test_gains_on_equal_latents(publish: Publish) -> None:
    """With the base scored on latents of its own the test of a gain rejects too often; on equal ones it does not."""
    rng, n, seeds, prompts, pictures = np.random.default_rng(14), 2000, 5, 20, 4
    rows = []
    for name, rho in (("latents of its own", 0.0), ("equal latents", 0.8), ("equal latents, closer pictures", 0.95)):
        base = rng.normal(size=(n, 1, prompts, pictures))
        noise = rng.normal(size=(n, seeds, prompts, pictures))
        tuned = 0.1 * rng.normal(size=(n, seeds, 1, 1)) + rho * base + (1 - rho**2) ** 0.5 * noise
        intervals = [seed_t(gain(_named(x), _named(y)).means) for x, y in zip(tuned, base, strict=True)]
        rate = share(i.excludes(0.0) for i in intervals)
        width = float(np.mean([i.half_width for i in intervals]))
        if rho:
            assert_at_most(rate, 0.065)
        else:
            with pytest.raises(AssertionError, match="is above"):
                assert_at_most(rate, 0.065)
        rows.append([name, rho, rate, f"{width:.3f}", f"{np.std([i.estimate for i in intervals]):.3f}"])
    columns = [
        "base scored on",
        "correlation of pictures",
        "false claims of a gain",
        "half width",
        "true SD of the gain",
    ]
    publish("gains", Table(columns, rows, f"{n} repetitions of 5 seeds, 20 prompts and 4 pictures."))


def _named(values: np.ndarray) -> SeedScores:
    """Scores (S, P, K) with their positions as identities."""
    return SeedScores(values, *(tuple(range(length)) for length in values.shape))


def test_transfer_ratios(publish: Publish) -> None:
    """Fieller's interval covers where the specialist's gain is clear, and is undefined where it is not."""
    rng, rows = np.random.default_rng(15), []
    for own in (4.0, 2.0, 1.0):
        for seeds in (3, 5, 10):
            data = rng.normal([[own / 2], [own]], size=(N, 2, seeds))
            intervals = [transfer_ratio(*pair) for pair in data]
            defined = [i for i in intervals if np.isfinite(i.low)]
            rate, undefined = coverage(defined, 0.5), share(not np.isfinite(i.low) for i in intervals)
            if own >= 4 or seeds == 10:
                assert_at_least(rate, 0.94)
            rows.append([f"{own:.0f} SD", seeds, rate, undefined])
    columns = ["specialist's gain", "seeds", "coverage where defined", "undefined"]
    publish("transfer", Table(columns, rows, f"{N} repetitions; the true ratio is one half."))


def test_summaries_of_the_matrix() -> None:
    """Cells of a row share their runs: summaries cover, and false harm is rare."""
    rng, n, trained, seeds = np.random.default_rng(16), 1000, 3, 5
    rows, columns = ["a", "b", "c"], ["a", "b", "c", "d", "e"]
    runs = rng.normal(size=(n, trained, 1, seeds))
    gains = 2.0 * np.eye(trained, 5)[None, :, :, None] + runs + 0.5 * rng.normal(size=(n, trained, 5, seeds))
    found = [generalisation(table, rows, columns) for table in gains]
    assert_at_least(coverage([g.on_target for g in found], 2.0), 0.95)
    assert_at_least(coverage([g.off_target for g in found], 0.0), 0.95)
    assert_at_least(coverage([g.gap for g in found], 2.0), 0.95)
    assert_at_most(share(g.harmed > 0 for g in found), 0.05)
    assert_exact(coverage([cell for g in found for cell in g.cells[0][:1]], 2.0), 0.95)
