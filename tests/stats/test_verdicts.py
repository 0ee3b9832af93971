"""Verdicts and gate outcomes: each word appears exactly where its rule says."""

import math

import numpy as np
import pytest

from harness.stats.gate import GateOutcome, gate
from harness.stats.power import detectable_difference
from harness.stats.verdict import Judgement, Pair, Procedure, Verdict, judge

CENTRED = np.array([-1.0, -0.4, 0.1, 0.5, 0.8])


def judge_one(a: object, b: object, procedure: Procedure = Procedure.WELCH, **options: object) -> Judgement:
    """Judge a family of one pair."""
    return judge([Pair("new", "old", a, b, **options)], procedure)[0]


def test_better_and_worse() -> None:
    """Clear differences are named in their direction, with a sentence that has all numbers."""
    up = judge_one(CENTRED + 5, CENTRED)
    down = judge_one(CENTRED, CENTRED + 5)
    assert (up.verdict, down.verdict) == (Verdict.BETTER, Verdict.WORSE)
    assert up.sentence.startswith("new is better than old: difference +5.0 [")
    assert "adjusted p < 0.001" in up.sentence
    assert "−5.0 [−" in down.sentence


def test_not_separated_states_what_could_have_been_found() -> None:
    """An undecided comparison names its smallest detectable difference."""
    result = judge_one(CENTRED + 0.3, CENTRED)
    assert result.verdict is Verdict.NOT_SEPARATED
    assert f"80 % power only from {result.detectable:.3g}" in result.sentence
    assert result.detectable > 1


def test_an_arm_without_results_is_said_to_have_none() -> None:
    """Instead of a sentence of numbers that are not there."""
    result = judge_one([], CENTRED)
    assert result.sentence == "new and old cannot be compared: one of them has no result."


def test_equivalent_within_the_margin() -> None:
    """Arms whose difference is surely inside the margin are equivalent."""
    result = judge_one(CENTRED / 1000 + 0.001, CENTRED / 1000)
    assert result.verdict is Verdict.EQUIVALENT
    assert judge_one(CENTRED / 1000 + 0.001, CENTRED / 1000, margin=1e-6).verdict is Verdict.NOT_SEPARATED


def test_too_few_seeds_for_the_permutation_test() -> None:
    """Three seeds of one reward cannot reject, whatever the data, and the sentence says so."""
    result = judge_one([10.0, 11.0, 12.0], [0.0, 1.0, 2.0], Procedure.PERMUTATION)
    assert result.verdict is Verdict.TOO_FEW_SEEDS
    assert result.smallest_adjusted_p == pytest.approx(0.1)
    assert "cannot reject at this number of seeds" in result.sentence


def test_too_many_hypotheses_for_five_seeds() -> None:
    """Seven hypotheses at five seeds put the smallest adjusted p above .05; six do not."""
    pair = Pair("new", "old", CENTRED + 9, CENTRED)
    assert {j.verdict for j in judge([pair] * 7)} == {Verdict.TOO_FEW_SEEDS}
    assert {j.verdict for j in judge([pair] * 6)} == {Verdict.BETTER}


def test_rewards_together_decide_with_few_seeds() -> None:
    """Three seeds on each of four rewards can decide what one reward cannot."""
    a = [np.array([1.0, 2.0, 1.5]) + r for r in range(4)]
    b = [np.array([0.0, 0.9, 0.2]) + r for r in range(4)]
    result = judge_one(a, b, Procedure.PERMUTATION)
    assert result.verdict is Verdict.BETTER
    assert result.comparison.arrangements == 20**4


def test_both_conditions_are_needed() -> None:
    """A large gain on one reward with a sure loss on the other has a small p and is still not called better."""
    result = judge_one([CENTRED / 10 + 9, CENTRED / 10 - 1], [CENTRED / 10, CENTRED / 10])
    assert result.adjusted_p < 0.001
    assert result.probability.estimate == 0.5
    assert result.verdict is Verdict.NOT_SEPARATED
    assert "compatible with one half" in result.sentence


def test_two_seeds_never_separate() -> None:
    """With two seeds of one reward P(better) always includes one half: too few seeds."""
    assert judge_one([10.0, 10.1], [0.0, 0.1]).verdict is Verdict.TOO_FEW_SEEDS
    assert judge_one([10.0], [0.0]).verdict is Verdict.TOO_FEW_SEEDS


def test_identical_seeds_are_stated() -> None:
    """Without any variance Welch's test is undefined, which is said and not called a tie."""
    result = judge_one([2.0] * 5, [1.0] * 5)
    assert result.verdict is Verdict.NOT_SEPARATED
    assert "no variance" in result.sentence
    assert "adjusted p undefined" in result.sentence


def test_missing_arms_stay_in_the_family() -> None:
    """An arm without data is undecided and still counts as a hypothesis for the others."""
    present, absent = judge(
        [Pair("a", "ref", CENTRED + 9, CENTRED), Pair("b", "ref", np.full(5, math.nan), CENTRED)], Procedure.WELCH
    )
    assert absent.verdict is Verdict.TOO_FEW_SEEDS
    assert present.adjusted_p == pytest.approx(2 * present.comparison.p)
    assert present.detectable == pytest.approx(detectable_difference(present.difference, alpha=0.025))
    assert present.simultaneous.level == pytest.approx(0.975)
    assert present.simultaneous.half_width > present.difference.half_width


def test_deterministic_arms() -> None:
    """A constant arm is met by a one-sample test, on either side; two constants are not tested."""
    up = judge_one(CENTRED + 9, [0.0], reference_deterministic=True)
    down = judge_one([0.0], CENTRED + 9, deterministic=True)
    assert (up.verdict, down.verdict) == (Verdict.BETTER, Verdict.WORSE)
    assert up.comparison.test == down.comparison.test == "one-sample t"
    assert down.difference.estimate == pytest.approx(-up.difference.estimate)
    both = judge_one([1.0], [0.0], deterministic=True, reference_deterministic=True)
    assert both.verdict is Verdict.NOT_SEPARATED
    assert both.difference.estimate == 1.0
    assert "nothing to test" in both.sentence


def test_paired_designs() -> None:
    """A declared pairing finds a small common shift that independent arms hide."""
    shifted = CENTRED + 0.2 + np.array([0.01, -0.01, 0.02, 0.0, -0.02])
    assert judge_one(shifted, CENTRED, Procedure.PAIRED).adjusted_p < 0.001
    assert judge_one(shifted, CENTRED, Procedure.WELCH).adjusted_p > 0.5


@pytest.mark.parametrize(
    ("shift", "outcome"),
    [
        (0.0, GateOutcome.EQUIVALENT),
        (0.5, GateOutcome.IMPROVED),
        (0.08, GateOutcome.IMPROVED),
        (-0.3, GateOutcome.WORSE),
        (-0.1, GateOutcome.INCONCLUSIVE),
    ],
)
def test_gate_outcomes(shift: float, outcome: GateOutcome) -> None:
    """The gate's word follows from where the interval of the difference lies."""
    wobble = np.array([0.02, -0.03, 0.04, -0.01, -0.02])
    result = gate(CENTRED + shift + wobble, CENTRED, 0.1)
    assert result.outcome is outcome
    assert (result.p_not_worse < 0.05) == (outcome not in (GateOutcome.WORSE, GateOutcome.INCONCLUSIVE))
    assert (result.seeds_needed is not None) == (outcome is GateOutcome.INCONCLUSIVE)


def test_gate_not_worse() -> None:
    """A wide interval above the lower margin and across zero is not worse, without being equivalent."""
    wobble = np.array([0.2, -0.15, 0.2, -0.1, -0.15])
    assert gate(CENTRED + 0.1 + wobble, CENTRED, 0.1).outcome is GateOutcome.NOT_WORSE


def test_gate_without_pairing_needs_more() -> None:
    """Without shared randomness the same shift is inconclusive."""
    wobble = np.array([0.02, -0.03, 0.04, -0.01, -0.02])
    assert gate(CENTRED + wobble, CENTRED, 0.1, same_seeds=False).outcome is GateOutcome.INCONCLUSIVE
