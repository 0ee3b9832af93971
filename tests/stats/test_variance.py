"""Variance components against sums written out, statsmodels' analysis of variance, identities and simulations."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from harness.stats.comparisons import welch
from harness.stats.intervals import crossed, crossed_difference, seed_t
from harness.stats.power import minimum_detectable_difference, pilot_inflation, seeds_needed
from harness.stats.seed_means import Array, SeedScores
from harness.stats.variance import Components, Contrast, components, contrast

SPREAD = {"seed": 0.3, "prompt": 0.8, "latent": 0.6, "seed_prompt": 0.4, "residual": 1.0}


def scores(values: Array, first: int = 0) -> SeedScores:
    """Scores with identities that count up; prompts from `first`."""
    s, p, k = values.shape
    return SeedScores(values, tuple(range(s)), tuple(f"p{first + i:03d}" for i in range(p)), tuple(range(k)))


def simulate(rng: np.random.Generator, s: int, p: int, k: int, **spread: float) -> Array:
    """(S, P, K) scores with these SDs."""
    sd = SPREAD | spread
    return (
        sd["seed"] * rng.normal(size=(s, 1, 1))
        + sd["prompt"] * rng.normal(size=(1, p, 1))
        + sd["latent"] * rng.normal(size=(1, p, k))
        + sd["seed_prompt"] * rng.normal(size=(s, p, 1))
        + sd["residual"] * rng.normal(size=(s, p, k))
    )


def values_of(found: Components) -> list[float]:
    """The five components."""
    return [found.seed, found.prompt, found.latent, found.seed_prompt, found.residual]


def test_a_table_worked_out_by_hand() -> None:
    """Two seeds, prompts and latents: all mean squares by pencil.

    Scores 0 2 | 4 6 and 2 4 | 10 8. Cell means 1 5 | 3 9, seed means 3 6, prompt means 2 7, mean 4.5. MS seed =
    4 * 4.5 = 18, MS prompt = 4 * 12.5 = 50, interaction +-.5 in four cells of two: 2 * 1 = 2. Latent means 1 3 | 7 7:
    MS latent = 2 * 2 / 2 = 2; what remains: deviations from cell means -1 1 -1 1 | -1 1 1 -1 less those of latent
    means -1 1 0 0: 0 0 -1 1 | 0 0 1 -1, so MS = 4 / 2 = 2.
    """
    found = components(scores(np.array([[[0.0, 2], [4, 6]], [[2, 4], [10, 8]]])))
    assert values_of(found) == pytest.approx([(18 - 2) / 4, (50 - 2 - 2 + 2) / 4, 0, 0, 2])


def test_components_solve_the_mean_squares_of_statsmodels() -> None:
    """An independent analysis of variance of the same nested and crossed design."""
    from statsmodels.formula.api import ols

    s, p, k = 4, 5, 3
    values = simulate(np.random.default_rng(5), s, p, k)
    index = np.indices(values.shape).reshape(3, -1)
    frame = pd.DataFrame({"y": values.ravel(), "s": index[0], "p": index[1], "l": index[1] * k + index[2]})

    def left(terms: str) -> float:
        """Residual sum of squares of a linear model."""
        return float(ols(f"y ~ {terms}", frame).fit().ssr)

    prompts, both = left("C(p)"), left("C(s):C(p)")
    ms_p, ms_s = (left("1") - prompts) / (p - 1), (prompts - left("C(p) + C(s)")) / (s - 1)
    ms_b = (left("C(p) + C(s)") - both) / ((s - 1) * (p - 1))
    ms_l = (prompts - left("C(l)")) / (p * (k - 1))
    ms_e = left("C(s):C(p) + C(l)") / ((s - 1) * p * (k - 1))
    expected = [
        (ms_s - ms_b) / (p * k),
        (ms_p - ms_b - ms_l + ms_e) / (s * k),
        (ms_l - ms_e) / s,
        (ms_b - ms_e) / k,
        ms_e,
    ]
    assert values_of(components(scores(values))) == pytest.approx(expected, rel=1e-6)


def test_every_component_is_unbiased() -> None:
    """Means over many made-up runs are the truth within three standard errors, in a contrast, too."""
    rng = np.random.default_rng(11)
    found = [components(scores(simulate(rng, 3, 6, 2))) for _ in range(3000)]
    table = np.array([values_of(one) for one in found])
    errors = table.std(axis=0, ddof=1) / math.sqrt(len(table))
    truth = np.array([SPREAD[name] ** 2 for name in ("seed", "prompt", "latent", "seed_prompt", "residual")])
    assert np.all(np.abs(table.mean(axis=0) - truth) < 3 * errors)
    assert np.all(errors < 0.05 * truth.max())
    shared = rng.normal(size=(1, 6, 2))  # what both arms share cancels
    pairs = [
        contrast(
            [scores(shared + simulate(rng, 3, 6, 2)), scores(shared + simulate(rng, 4, 6, 2, prompt=0.0))], (1, -1)
        )
        for _ in range(3000)
    ]
    own = np.array([[pair.prompt, pair.latent] for pair in pairs])
    errors = own.std(axis=0, ddof=1) / math.sqrt(len(own))
    assert np.all(np.abs(own.mean(axis=0) - [SPREAD["prompt"] ** 2, 2 * SPREAD["latent"] ** 2]) < 3 * errors)


def positive(found: Contrast) -> bool:
    """Whether nothing was taken as zero."""
    return min(found.prompt, found.latent, *(min(c.seed, c.seed_prompt, c.residual) for c in found.sides)) > 0


def test_the_design_itself_is_predicted_exactly() -> None:
    """For the design it was estimated from, a contrast gives the standard errors and df of the intervals."""
    a, b = (simulate(np.random.default_rng(seed), 6, 12, 3) for seed in (2, 3))
    one, two = contrast([scores(a)], [1.0]), contrast([scores(a), scores(b)], [1.0, -1.0])
    assert positive(one)
    assert positive(two)
    pairs = [
        (one.expected(6, 12, 3, unseen=False), seed_t(a.mean(axis=(1, 2)))),
        (one.expected(6, 12, 3, unseen=True), crossed(a.mean(axis=2))),
        (two.expected(6, 12, 3, unseen=True), crossed_difference(a.mean(axis=2), b.mean(axis=2))),
    ]
    for predicted, observed in pairs:
        assert predicted.standard_error == pytest.approx(observed.standard_error, rel=1e-9)
        assert predicted.df == pytest.approx(observed.df, rel=1e-9)
    assert values_of(one.sides[0])[1:3] == pytest.approx([one.prompt, one.latent])


def test_what_is_predicted_for_other_designs_comes_true() -> None:
    """The variance of means simulated at other numbers of seeds, prompts and latents is the one predicted."""
    rng = np.random.default_rng(7)
    squares = {name: sd**2 for name, sd in SPREAD.items()}
    truth = Components(**squares, seeds=5, prompts=8, latents=2)
    known = Contrast((truth,), (1.0,), squares["prompt"], squares["latent"])
    for s, p, k in [(5, 8, 2), (10, 8, 2), (5, 32, 2), (5, 8, 8)]:
        means = np.array([simulate(rng, s, p, k).mean() for _ in range(4000)])
        fixed = np.array([simulate(rng, s, p, k, prompt=0.0, latent=0.0).mean() for _ in range(4000)])
        for sample, unseen in ((means, True), (fixed, False)):
            expected = known.expected(s, p, k, unseen=unseen).standard_error ** 2
            assert sample.var(ddof=1) == pytest.approx(expected, rel=4 * math.sqrt(2 / 4000))


def test_seeds_needed_are_those_of_the_two_sample_formula() -> None:
    """Two arms with the same spread, this suite: the closed form of the t test's power."""
    side = Components(0.04, 1.0, 0.0, 0.0, 0.0, 5, 10, 2)
    pair = Contrast((side, side), (1.0, -1.0), 0.0, 0.0)
    for difference in (0.15, 0.3, 1.0):
        assert pair.seeds_needed(difference, 10, 2, unseen=False) == seeds_needed(difference, 0.2)
    assert pair.detectable(5, 10, 2, unseen=False) == pytest.approx(0.2 * minimum_detectable_difference(5), rel=1e-9)


def test_no_number_of_seeds_replaces_prompts() -> None:
    """Where prompts differ much, unseen ones need more prompts: seeds alone never find the difference."""
    side = Components(0.01, 1.0, 0.5, 0.0, 0.1, 5, 10, 2)
    pair = Contrast((side, side), (1.0, -1.0), 1.0, 0.5)
    assert pair.seeds_needed(0.2, 10, 2, unseen=False) is not None
    assert pair.seeds_needed(0.2, 10, 2, unseen=True) is None
    assert pair.seeds_needed(0.2, 1000, 2, unseen=True) is not None
    assert pair.seeds_needed(0.2, 1000, 2, unseen=True, limit=2) is None


def test_inflation_scales_what_belongs_to_seeds() -> None:
    """Twice the SD over seeds, twice the difference that is found; prompts' own spread stays."""
    side = Components(0.04, 1.0, 0.2, 0.1, 0.3, 5, 10, 2)
    pair = Contrast((side, side), (1.0, -1.0), 0.5, 0.2)
    double = pair.inflated(2.0)
    assert double.detectable(5, 10, 2, unseen=False) == pytest.approx(2 * pair.detectable(5, 10, 2, unseen=False))
    assert (double.prompt, double.latent) == (pair.prompt, pair.latent)


def test_negative_estimates_count_as_zero_in_predictions() -> None:
    """They are kept as they are found; predictions have no negative part, and the design's own variance is kept."""
    side = Components(-0.02, -0.1, -0.1, -0.1, 0.8, 5, 10, 2)
    assert side.seed_variance(10, 2) == pytest.approx(-0.02 - 0.01 + 0.04)
    assert side.seed_variance(20, 4) == pytest.approx(0.01 / 4)
    assert Components(-0.5, 0, 0, 0.1, 0.1, 5, 10, 2).seed_variance(20, 4) == 0.0
    for prompt, latent, own, other in [(-0.1, 0.6, 0.2, 0.1), (0.3, -0.2, 0.2, 0.2), (-0.1, 0.1, 0.0, 0.0)]:
        pair = Contrast((side,), (1.0,), prompt, latent)
        assert pair.prompt_variance(2) == pytest.approx(own)
        assert pair.prompt_variance(4) == pytest.approx(other)


@pytest.mark.parametrize("seed", range(8))
def test_the_design_itself_is_predicted_whatever_is_negative(seed: int) -> None:
    """Small tables without an effect of seeds, where negative estimates are common."""
    rng = np.random.default_rng(seed)
    a, b = (simulate(rng, 4, 6, 2, seed=0.0, seed_prompt=0.0) for _ in range(2))
    pair = contrast([scores(a), scores(b)], [1.0, -1.0])
    for unseen, cells in ((False, None), (True, (a.mean(axis=2), b.mean(axis=2)))):
        predicted = pair.expected(4, 6, 2, unseen=unseen)
        observed = crossed_difference(*cells) if cells else welch(a.mean(axis=(1, 2)), b.mean(axis=(1, 2))).interval
        assert predicted.standard_error == pytest.approx(observed.standard_error)
        assert predicted.df == pytest.approx(observed.df, rel=0.3 if unseen else 1e-9)


def test_missing_pictures_and_seeds_are_left_out_and_said() -> None:
    """Prompts with a gap and seeds without scores; the rest is as if these had never been there."""
    values = simulate(np.random.default_rng(1), 4, 6, 2)
    whole = components(scores(values[:3, 1:]))
    values[3] = np.nan
    values[1, 0, 1] = np.nan
    found = components(scores(values))
    assert values_of(found) == pytest.approx(values_of(whole))
    assert found.note == "1 seeds without scores left out; 1 incomplete prompts left out"
    assert (found.seeds, found.prompts, found.latents) == (3, 5, 2)


def test_terms_are_matched_by_identity() -> None:
    """Prompts that only one arm has are left out, in whatever order they come."""
    a, b = (simulate(np.random.default_rng(seed), 4, 6, 2) for seed in (1, 2))
    order = [3, 1, 0, 2, 4, 5]
    shuffled = SeedScores(b[:, order], (0, 1, 2, 3), tuple(scores(b).prompts[i] for i in order), (0, 1))
    assert contrast([scores(a), shuffled], (1, -1)) == contrast([scores(a), scores(b)], (1, -1))
    found = contrast([scores(a), scores(b, first=2)], (1, -1))
    expected = contrast([scores(a[:, 2:]), scores(b[:, :4])], (1, -1))
    assert (found.prompt, found.latent) == pytest.approx((expected.prompt, expected.latent))
    assert found.sides[0].note == "4 incomplete prompts left out"


def test_designs_that_cannot_be_decomposed() -> None:
    """One seed or prompt: nothing; one latent: latents stay in the prompts, and other numbers of them are unknown."""
    values = simulate(np.random.default_rng(3), 4, 6, 2)
    for few in (values[:1], values[:, :1], values[:, :0]):
        assert all(math.isnan(value) for value in values_of(components(scores(few))))
        assert math.isnan(contrast([scores(few)], [1.0]).detectable(5, 6, 2, unseen=False))
        assert contrast([scores(few)], [1.0]).seeds_needed(0.2, 6, 2, unseen=False) is None
    one = contrast([scores(values[:, :, :1])], [1.0])
    assert one.expected(4, 6, 1, unseen=False).standard_error == pytest.approx(
        seed_t(values[:, :, 0].mean(axis=1)).standard_error
    )
    assert math.isnan(one.detectable(4, 6, 2, unseen=False))
    assert math.isnan(one.detectable(4, 6, 2, unseen=True))


def test_copies_of_every_latent_change_no_prediction() -> None:
    """Two copies of every picture: the same intervals, so that pictures never pass for repetitions."""
    values = simulate(np.random.default_rng(4), 5, 8, 2, seed=1.0, seed_prompt=1.0)
    once, twice = contrast([scores(values)], [1.0]), contrast([scores(np.repeat(values, 2, axis=2))], [1.0])
    assert positive(once)
    assert positive(twice)
    for unseen in (False, True):
        first, second = once.expected(5, 8, 2, unseen=unseen), twice.expected(5, 8, 4, unseen=unseen)
        assert (first.standard_error, first.df) == pytest.approx((second.standard_error, second.df))


def test_the_inflation_is_that_of_the_seeds_behind_a_contrast() -> None:
    """One arm of five seeds: the pilot factor of five; two alike: their eight degrees of freedom, as of nine seeds."""
    one = scores(simulate(np.random.default_rng(4), 5, 6, 2))

    assert contrast([one], [1.0]).inflation == pytest.approx(pilot_inflation(5))
    assert contrast([one, one], [1.0, -1.0]).inflation == pytest.approx(pilot_inflation(9))
