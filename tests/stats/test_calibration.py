"""Simulations in which the truth is known: intervals cover as stated and tests reject no more than stated.

Every check has a margin of three standard errors of the simulation; one estimator that takes pictures for
repetitions must fail the check that the others pass. This is the quick selection; `tests/calibration` is the whole.
"""

import numpy as np
import pytest
from scipy import stats

from harness.stats.comparisons import paired, permutation, welch
from harness.stats.effects import probability_better
from harness.stats.gate import GateOutcome, gate, tost
from harness.stats.intervals import Interval, crossed, crossed_difference, seed_t
from harness.stats.matrix import transfer_ratio
from harness.stats.multiplicity import holm
from harness.stats.power import minimum_detectable_difference
from harness.stats.verdict import Pair, Verdict, judge

N = 1000
SEEDS, PROMPTS, PICTURES = 5, 12, 4


def tolerance(rate: float, n: int) -> float:
    """Three standard errors of a simulated rate."""
    return float(3 * np.sqrt(rate * (1 - rate) / n))


def covers(intervals: list[Interval], truth: float) -> float:
    """Share of intervals that contain the truth."""
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


def check_coverage(coverage: float, n: int = N, nominal: float = 0.95) -> None:
    """The coverage is the nominal one up to the error of the simulation."""
    assert abs(coverage - nominal) <= tolerance(nominal, n), coverage


def check_level(rejections: float, n: int = N, alpha: float = 0.05) -> None:
    """The test rejects a true hypothesis at most as often as stated, up to the error of the simulation."""
    assert rejections <= alpha + tolerance(alpha, n), rejections


def scores(rng: np.random.Generator, n: int, s: int = SEEDS, *, prompt: float = 0.0) -> np.ndarray:
    """(n, S, P, K) scores with mean 0 and variation of seeds, prompts, seeds by prompts, and pictures."""
    return (
        rng.normal(size=(n, s, 1, 1))
        + prompt * rng.normal(size=(n, 1, PROMPTS, 1))
        + 0.5 * rng.normal(size=(n, s, PROMPTS, 1))
        + rng.normal(size=(n, s, PROMPTS, PICTURES))
    )


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_coverage_of_the_seed_interval(seeds: int) -> None:
    """The t interval on seed means covers the mean in 95 % of repetitions, from three seeds on."""
    data = scores(np.random.default_rng(seeds), N, seeds)
    check_coverage(covers([seed_t(x) for x in data.mean(axis=(2, 3))], 0.0))


def test_pseudo_replication_fails_the_same_check() -> None:
    """An interval that takes pictures for repetitions covers so rarely that the check refuses it."""
    data = scores(np.random.default_rng(1), N)
    pooled = [seed_t(x.ravel()) for x in data]
    assert covers(pooled, 0.0) < 0.6
    with pytest.raises(AssertionError):
        check_coverage(covers(pooled, 0.0))


def test_coverage_for_unseen_prompts() -> None:
    """Where prompts vary and are drawn anew, the crossed interval covers and the seed interval does not."""
    cells = scores(np.random.default_rng(2), N, prompt=2.0).mean(axis=3)
    assert covers([crossed(x) for x in cells], 0.0) > 0.95 - 0.015 - tolerance(0.95, N)
    assert covers([seed_t(x.mean(axis=1)) for x in cells], 0.0) < 0.9


def test_coverage_of_a_difference_over_unseen_prompts() -> None:
    """The crossed interval of a difference covers where each method has its own hard prompts."""
    rng = np.random.default_rng(3)
    a, b = (scores(rng, N, prompt=1.0).mean(axis=3) for _ in "ab")
    coverage = covers([crossed_difference(x, y) for x, y in zip(a, b, strict=True)], 0.0)
    assert coverage > 0.95 - 0.015 - tolerance(0.95, N)


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_of_the_mean_over_rewards(seeds: int) -> None:
    """The stratified t interval covers at least as stated when rewards differ in spread."""
    data = np.random.default_rng(seeds).normal(size=(N, 4, seeds)) * np.array([0.5, 1.0, 1.0, 2.0])[:, None]
    assert covers([seed_t(x) for x in data], 0.0) >= 0.95 - tolerance(0.95, N)


@pytest.mark.parametrize("probability", [0.5, 0.76, 0.92])
@pytest.mark.parametrize("rewards", [1, 4])
def test_coverage_of_the_probability_of_improvement(probability: float, rewards: int) -> None:
    """The score interval of P(better) covers at five seeds, for one reward and averaged over four."""
    rng = np.random.default_rng(rewards)
    shift = np.sqrt(2) * stats.norm.ppf(probability)
    a, b = rng.normal(size=(2, N, rewards, SEEDS))
    intervals = [probability_better(x + shift, y) for x, y in zip(a, b, strict=True)]
    assert covers(intervals, probability) >= 0.94 - tolerance(0.95, N)


def test_coverage_of_fieller_intervals() -> None:
    """The transfer ratio covers where the specialist's gain is clear."""
    rng = np.random.default_rng(6)
    intervals = [transfer_ratio(*pair) for pair in rng.normal([[2.0], [4.0]], size=(N, 2, SEEDS))]
    defined = [i for i in intervals if np.isfinite(i.low)]
    assert len(defined) > 0.95 * N
    assert covers(defined, 0.5) >= 0.94 - tolerance(0.95, len(defined))


@pytest.mark.parametrize(("seeds", "rewards"), [(5, 1), (3, 4), (5, 3)])
def test_level_of_comparisons(seeds: int, rewards: int) -> None:
    """Welch and the exact permutation test keep their level, for one reward and stratified."""
    n = 500
    a, b = np.random.default_rng(10 * seeds + rewards).normal(size=(2, n, rewards, seeds))
    pairs = [(list(x), list(y)) for x, y in zip(a, b, strict=True)]
    check_level(float(np.mean([welch(x, y).p < 0.05 for x, y in pairs])), n)
    check_level(float(np.mean([permutation(x, y).p < 0.05 for x, y in pairs])), n)


def test_level_of_the_paired_test() -> None:
    """The paired test keeps its level and uses the correlation that Welch's test cannot."""
    rng = np.random.default_rng(8)
    shared = 2 * rng.normal(size=(N, SEEDS))
    a, b = shared + rng.normal(size=(N, SEEDS)), shared + rng.normal(size=(N, SEEDS))
    check_level(float(np.mean([paired(x, y).p < 0.05 for x, y in zip(a, b, strict=True)])))
    powers = [np.mean([test(x + 3, y).p < 0.05 for x, y in zip(a, b, strict=True)]) for test in (paired, welch)]
    assert powers[0] > powers[1] + 0.2


def test_family_wise_error() -> None:
    """Over 24 comparisons of equal methods raw tests mislead in most benchmarks and Holm in at most 5 %."""
    n = 200
    data = np.random.default_rng(9).normal(size=(n, 4, 4, SEEDS))
    raw, adjusted = [], []
    for methods in data:
        p = [welch(methods[i, r], methods[j, r]).p for r in range(4) for i in range(4) for j in range(i)]
        raw.append(min(p) < 0.05)
        adjusted.append(holm(p).min() < 0.05)
    assert np.mean(raw) > 0.4
    check_level(float(np.mean(adjusted)), n)


def test_verdicts_of_equal_methods() -> None:
    """Three equal methods against a reference are declared different in at most 5 % of benchmarks."""
    n = 200
    data = np.random.default_rng(11).normal(size=(n, 4, 3, SEEDS))
    declared = []
    for reference, *arms in data:
        family = judge([Pair(str(i), "reference", list(arm), list(reference)) for i, arm in enumerate(arms)])
        declared.append(any(j.verdict in (Verdict.BETTER, Verdict.WORSE) for j in family))
    check_level(float(np.mean(declared)), n)


def test_power_is_as_predicted() -> None:
    """At the smallest detectable difference the test finds it in 80 % of repetitions."""
    shift = minimum_detectable_difference(SEEDS)
    a, b = np.random.default_rng(12).normal(size=(2, N, SEEDS))
    power = np.mean([welch(x + shift, y).p < 0.05 for x, y in zip(a, b, strict=True)])
    assert power >= 0.8 - 0.02 - tolerance(0.8, N)


def test_level_of_equivalence() -> None:
    """Methods exactly one margin apart are called equivalent in at most 5 % of repetitions."""
    a, b = np.random.default_rng(13).normal(size=(2, N, SEEDS))
    pairs = zip(a, b, strict=True)
    check_level(float(np.mean([tost(welch(x + 2.5, y).interval, 2.5) < 0.05 for x, y in pairs])))


def test_gate_catches_a_loss_and_spares_the_margin() -> None:
    """A loss of three margins is caught with five seeds; a loss of one margin passes and fails in at most 5 % each."""
    n, margin = 200, 0.1
    rng = np.random.default_rng(14)
    base = rng.normal(size=(n, SEEDS))
    noise = margin * rng.normal(size=(n, SEEDS))
    outcomes = {
        loss: [gate(x - loss * margin + e, x, margin).outcome for x, e in zip(base, noise, strict=True)]
        for loss in (1, 3)
    }
    assert np.mean([o is GateOutcome.WORSE for o in outcomes[3]]) >= 0.8
    check_level(float(np.mean([o is GateOutcome.WORSE for o in outcomes[1]])), n)
    passed = (GateOutcome.NOT_WORSE, GateOutcome.EQUIVALENT, GateOutcome.IMPROVED)
    check_level(float(np.mean([o in passed for o in outcomes[1]])), n)
