"""The whole of `compare` on made-up snapshots: what it finds, and what it calls WORSE without reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.regression.comparing import compare
from harness.regression.snapshot import Scored, Snapshot, Trained
from harness.stats.gate import GateOutcome
from harness.stats.power import t_power
from harness.stats.seed_means import Array
from tests.calibration.rates import assert_at_least, assert_at_most, share

N, SEEDS, PROMPTS, MARGIN = 400, 5, 12, 0.1
PAIRS = tuple((f"p{prompt:02d}", noise) for prompt in range(PROMPTS) for noise in range(2))
ARMS = tuple(f"arm {i}" for i in range(6))


def snapshot(rng: np.random.Generator, seed_values: Array, base: Array, first: int = 0) -> Snapshot:
    """A run whose arms' (A, S) gains are these, with noise of pictures that leaves the means alone."""
    cells = [Trained("base", "", -1, "completed", {"r": Scored(float(base.mean()), "base", base)}, {})]
    for arm, values in zip(ARMS, seed_values, strict=False):
        for i, value in enumerate(values):
            noise = rng.normal(size=len(base))
            scores = base + value + noise - noise.mean()
            scored = {"r": Scored(float(value), str(rng.random()), scores)}
            cells.append(Trained(arm, "r", first + i, "completed", scored, {}))
    known: dict[str, Any] = {"method": "m", "version": "1", "kind": "training", "seeded": True, "config": {}}
    return Snapshot(
        name="run", run="run", until="", command="", git={}, platform={}, identity={}, rewards={"r": "1"},
        arms=tuple({"label": arm, **known, "sampler": {}} for arm in ARMS[: len(seed_values)]),
        training_rewards=("r",), base_sd={"r": 1.0}, pairs=PAIRS, cells=tuple(cells), missing=(), timing={},
    )  # fmt: skip


def outcome(rng: np.random.Generator, new: Array, old: Array, first: int = 0) -> GateOutcome:
    """Of the comparison of (A, S) gains; the new run's seeds begin at `first`."""
    base = rng.normal(size=len(PAIRS))
    return compare(snapshot(rng, new, base, first), snapshot(rng, old, base), MARGIN).outcome


@pytest.mark.parametrize("sd", [0.05, 0.10, 0.14])
def test_three_margins_are_caught(sd: float) -> None:
    """With five common seeds, as far as paired differences vary less than 1.4 margins; as the noncentral t says."""
    rng = np.random.default_rng(41)
    old = rng.normal(0.4, 0.3, size=(N, 1, SEEDS))
    new = old - 3 * MARGIN + rng.normal(0, sd, size=old.shape)
    caught = share(outcome(rng, x, y) is GateOutcome.WORSE for x, y in zip(new, old, strict=True))

    assert_at_least(caught, 0.8)
    assert_at_least(caught, t_power(2 * MARGIN / sd * SEEDS**0.5, SEEDS - 1, 0.05, sides=1))
    assert_at_most(caught, t_power(2 * MARGIN / sd * SEEDS**0.5, SEEDS - 1, 0.05, sides=1))


@pytest.mark.parametrize("sd", [0.05, 0.2])
def test_the_same_code_on_other_seeds_is_rarely_worse(sd: float) -> None:
    """Independent seeds, no change: fewer false alarms than at the margin, the fewer the less seeds vary."""
    rng = np.random.default_rng(42)
    new, old = rng.normal(0.4, sd, size=(2, N, 1, SEEDS))
    worse = share(outcome(rng, x, y, first=100) is GateOutcome.WORSE for x, y in zip(new, old, strict=True))

    assert_at_most(worse, 0.001 if sd < MARGIN else 0.05)


def test_six_arms_at_the_margin_rarely_fail() -> None:
    """The family-wise rate stays at 5 % where every arm has lost exactly the margin."""
    rng = np.random.default_rng(43)
    old = rng.normal(0.4, 0.3, size=(N, len(ARMS), SEEDS))
    new = old - MARGIN + rng.normal(0, 0.1, size=old.shape)
    assert_at_most(share(outcome(rng, x, y) is GateOutcome.WORSE for x, y in zip(new, old, strict=True)), 0.05)
