"""The regression gate: a loss of the margin fails rarely and passes rarely, larger losses are caught."""

from __future__ import annotations

import numpy as np

from harness.stats.gate import GateOutcome, GateResult, gate
from harness.stats.multiplicity import holm
from harness.stats.seed_means import Array
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_least, assert_at_most, assert_exact, share

N, SEEDS = 2000, 5
PASSED = (GateOutcome.EQUIVALENT, GateOutcome.IMPROVED, GateOutcome.NOT_WORSE)


def versions(rng: np.random.Generator, size: tuple[int, ...], correlation: float) -> tuple[Array, Array]:
    """New and old seed means of SD one."""
    shared, own, other = rng.normal(size=(3, *size))
    weights = correlation**0.5, (1 - correlation) ** 0.5
    return weights[0] * shared + weights[1] * own, weights[0] * shared + weights[1] * other


def test_the_gate(publish: Publish) -> None:
    """At the margin 5 % pass and 5 % fail; shared randomness is what decides no change; three margins are caught."""
    rng, margin, rows = np.random.default_rng(22), 1.0, []
    for correlation in (0.9, 0.0):
        new, old = versions(rng, (N, SEEDS), correlation)
        for loss in (0.0, 1.0, 3.0):
            found: list[GateResult] = [gate(x - loss * margin, y, margin) for x, y in zip(new, old, strict=True)]
            passed = share(result.outcome in PASSED for result in found)
            worse = share(result.outcome is GateOutcome.WORSE for result in found)
            if loss == 0:
                assert_at_most(worse, 0.05)
            elif loss == 1:
                assert_exact(passed, 0.05)
                assert_exact(worse, 0.05)
            else:
                assert_at_least(worse, 0.8 if correlation else 0.7)
            undecided = share(result.outcome is GateOutcome.INCONCLUSIVE for result in found)
            rows.append([f"{correlation:.1f}", f"{loss:.0f}", passed, undecided, worse])
    columns = ["correlation of seeds", "loss, margins", "passes", "inconclusive", "WORSE"]
    publish("gate", Table(columns, rows, f"{N} repetitions of {SEEDS} seeds; the margin is one SD of seed means."))


def test_many_cells() -> None:
    """Of 20 cells at the margin some cell fails in most comparisons, with Holm's adjustment in 5 % at most."""
    rng, n, cells, margin = np.random.default_rng(23), 500, 20, 1.0
    new, old = versions(rng, (n, cells, SEEDS), 0.9)
    p = np.array(
        [
            [gate(x - margin, y, margin).difference.p_value(-margin, "less") for x, y in zip(some, others, strict=True)]
            for some, others in zip(new, old, strict=True)
        ]
    )
    assert share((p < 0.05).any(axis=1)).value > 0.5
    assert_at_most(share(holm(row).min() < 0.05 for row in p), 0.05)
