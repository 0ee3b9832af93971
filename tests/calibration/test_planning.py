"""Variance components, and the designs that are planned from them: what was promised is what such runs find."""

from __future__ import annotations

import numpy as np
from scipy import stats

from harness.stats.comparisons import welch
from harness.stats.intervals import crossed_difference
from harness.stats.power import t_power
from harness.stats.seed_means import Array, SeedScores
from harness.stats.variance import Components, Contrast, components, contrast
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import Rate, assert_at_least, assert_exact, share

PROMPTS, LATENTS, PILOT = 12, 2, 5
MANY, PILOTS = 2000, 500
NAMES = ("seed", "prompt", "latent", "seed_prompt", "residual")
SPREADS = {
    "seeds dominate": (0.3, 0.2, 0.2, 0.2, 0.5),
    "pictures dominate": (0.05, 0.2, 0.3, 0.2, 1.0),
    "prompts differ": (0.2, 0.4, 0.3, 0.4, 0.5),
}


def arm(rng: np.random.Generator, seeds: int, spread: tuple[float, ...]) -> Array:
    """(S, P, K) scores whose prompts and latents are drawn anew."""
    seed, prompt, latent, both, rest = spread
    return (
        seed * rng.normal(size=(seeds, 1, 1))
        + prompt * rng.normal(size=(1, PROMPTS, 1))
        + latent * rng.normal(size=(1, PROMPTS, LATENTS))
        + both * rng.normal(size=(seeds, PROMPTS, 1))
        + rest * rng.normal(size=(seeds, PROMPTS, LATENTS))
    )


def scores(values: Array) -> SeedScores:
    """With identities that count up."""
    return SeedScores(values, *(tuple(range(size)) for size in values.shape))


def truth(spread: tuple[float, ...]) -> Contrast:
    """Two arms with these SDs, whose prompts' effects are independent."""
    squares = dict(zip(NAMES, (sd**2 for sd in spread), strict=True))
    side = Components(**squares, seeds=PILOT, prompts=PROMPTS, latents=LATENTS)
    return Contrast((side, side), (1.0, -1.0), 2 * squares["prompt"], 2 * squares["latent"])


def test_components_are_unbiased(publish: Publish) -> None:
    """The mean over pilots is the truth: three standard errors for all components of all spreads together."""
    rng, rows = np.random.default_rng(21), []
    # Each of them alone would be outside of three in one case of 370.
    reach = stats.norm.isf(stats.norm.sf(3) / (len(SPREADS) * len(NAMES)))
    for name, spread in SPREADS.items():
        found = [components(scores(arm(rng, PILOT, spread))) for _ in range(MANY)]
        table = np.array([[getattr(one, part) for part in NAMES] for one in found])
        expected, error = np.square(spread), table.std(axis=0, ddof=1) / np.sqrt(MANY)
        assert np.all(np.abs(table.mean(axis=0) - expected) <= reach * error), name
        rows.append([name, *(f"{t:.3f} / {m:.3f}" for t, m in zip(expected, table.mean(axis=0), strict=True))])
    note = f"{MANY} pilots of {PILOT} seeds, {PROMPTS} prompts and {LATENTS} latents: true variance / mean estimate."
    columns = ["spread", "seeds", "prompts", "latents", "seeds x prompts", "seeds x latents"]
    publish("components", Table(columns, rows, note))


def test_planned_designs_find_what_they_are_planned_for(publish: Publish) -> None:
    """Power at the planned number of seeds is .8; of plans from small pilots, four in five assured ones are enough."""
    rng, rows = np.random.default_rng(22), []
    for name, spread in SPREADS.items():
        known = truth(spread)
        for unseen in (False, True):
            difference = known.detectable(9, PROMPTS, LATENTS, unseen=unseen) * 0.99
            seeds = known.seeds_needed(difference, PROMPTS, LATENTS, unseen=unseen)
            assert seeds == 10
            power = _power(rng, spread, difference, seeds, unseen)
            # The test for unseen prompts has approximate degrees of freedom.
            (assert_at_least if unseen else assert_exact)(power, _planned(known, difference, seeds, unseen))
            assert_at_least(power, 0.8)
            row = [name, "unseen prompts" if unseen else "this suite", str(power)]
            rows.append([*row, *(["-", "-"] if unseen else map(str, _pilots(rng, spread, difference, seeds)))])
    note = (
        f"Ten seeds, which the true variances ask for. Power: {MANY} repetitions. Enough: the share of {PILOTS} pilots "
        f"of {PILOT} seeds that ask for ten or more, as they are, and with their SDs raised for 80 % assurance."
    )
    columns = ["spread", "target", "power", "pilot as it is: enough", "assured: enough"]
    publish("planning", Table(columns, rows, note))


def _planned(known: Contrast, difference: float, seeds: int, unseen: bool) -> float:
    """The power that is promised: a little above .8, since seeds are whole."""
    expected = known.expected(seeds, PROMPTS, LATENTS, unseen=unseen)
    return t_power(difference / expected.standard_error, expected.df, 0.05)


def _power(rng: np.random.Generator, spread: tuple[float, ...], difference: float, seeds: int, unseen: bool) -> Rate:
    if not unseen:  # effects of prompts that stay are part of the truth
        spread = (spread[0], 0.0, 0.0, *spread[3:])
    found = []
    for _ in range(MANY):
        a, b = (arm(rng, seeds, spread).mean(axis=2) for _ in range(2))
        if unseen:
            found.append(crossed_difference(a + difference, b).p_value() < 0.05)
        else:
            found.append(welch(a.mean(axis=1) + difference, b.mean(axis=1)).p < 0.05)
    return share(found)


def _pilots(rng: np.random.Generator, spread: tuple[float, ...], difference: float, seeds: int) -> tuple[Rate, Rate]:
    asked = []
    for _ in range(PILOTS):
        pair = contrast([scores(arm(rng, PILOT, spread)) for _ in range(2)], [1.0, -1.0])
        plans = (pair, pair.inflated(pair.inflation))
        asked.append([plan.seeds_needed(difference, PROMPTS, LATENTS, unseen=False) for plan in plans])
    plain, assured = (share(need is None or need >= seeds for need in column) for column in zip(*asked, strict=True))
    assert_at_least(assured, 0.8)
    return plain, assured
