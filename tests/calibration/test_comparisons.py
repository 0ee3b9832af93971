"""Two arms: how often tests reject where nothing differs, how often where something does, and what intervals cover."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.stats.comparisons import against_constant, paired, permutation, welch
from harness.stats.gate import tost
from harness.stats.intervals import crossed_difference
from harness.stats.seed_means import Array
from tests.calibration.conftest import Publish
from tests.calibration.page import Table
from tests.calibration.rates import assert_at_least, assert_at_most, assert_exact, coverage, share
from tests.calibration.structures import Shape, Spread, cells, draw

N, MANY = 600, 2000


@dataclass(frozen=True)
class Case:
    """Two arms of seeds: the second arm's SD, the correlation between equal seeds, and the shape of both."""

    name: str
    seeds: int = 5
    others: int = 5
    sd: float = 1.0
    correlation: float = 0.0
    shape: Shape = "normal"
    between_rewards: float = 0.0

    def arms(self, rng: np.random.Generator, n: int, rewards: int) -> tuple[Array, Array]:
        """(n, R, S) and (n, R, S') values of equal means."""
        own = [self._seeds(rng, (n, rewards, s)) for s in (self.seeds, self.others)]
        if self.correlation:
            shared = self._seeds(rng, (n, rewards, self.seeds))
            weights = self.correlation**0.5, (1 - self.correlation) ** 0.5
            own = [weights[0] * shared + weights[1] * x for x in own]
        return own[0], self.sd * own[1]

    def _seeds(self, rng: np.random.Generator, size: tuple[int, int, int]) -> Array:
        """Values that a seed may have in common between its trainings on several rewards."""
        own, common = draw(rng, size, self.shape), draw(rng, (size[0], 1, size[2]), self.shape)
        return (1 - self.between_rewards) ** 0.5 * own + self.between_rewards**0.5 * common


def test_one_reward(publish: Publish) -> None:
    """Welch's and the paired test keep 5 % with normal seeds, the permutation test wherever arms are exchangeable."""
    rng, shift = np.random.default_rng(4), 1.5
    cases = [
        Case("S=3", 3, 3),
        Case("S=5"),
        Case("S=8", 8, 8),
        Case("S=5 against 3", 5, 3),
        Case("S=5, SD ratio 4", sd=4),
        Case("S=5, seeds correlated .8", correlation=0.8),
        Case("S=5, heavy tails", shape="heavy tails"),
        Case("S=5, skewed", shape="skewed"),
        Case("S=5, skewed, SD ratio 3", shape="skewed", sd=3),
    ]
    rows = []
    for case in cases:
        n = N if case.seeds == 8 else MANY
        a, b = (x[:, 0] for x in case.arms(rng, n, 1))
        tests = [welch, permutation] + [paired] * (case.seeds == case.others)
        level = [share(test(x, y).p < 0.05 for x, y in zip(a, b, strict=True)) for test in tests]
        power = [share(test(x + shift, y).p < 0.05 for x, y in zip(a, b, strict=True)) for test in tests]
        if case.shape != "skewed":
            assert_at_most(level[0], 0.05)
        if case.sd == 1:
            assert_at_most(level[1], 0.05)
        if case.shape == "normal" and len(tests) == 3:
            assert_exact(level[2], 0.05)
        shown = [f"{before} / {after}" for before, after in zip(level, power, strict=True)]
        rows.append([case.name, *shown, *["-"] * (3 - len(tests))])
    note = f"{MANY} repetitions (S=8: {N}). Share of p < .05 where nothing differs / at a difference of {shift} SD."
    publish("tests", Table(["arms", "Welch", "permutation", "paired"], rows, note))


def test_several_rewards(publish: Publish) -> None:
    """Over four rewards the stratified tests keep 5 % and find what no single reward shows."""
    rng, rewards, shift = np.random.default_rng(5), 4, 0.8
    cases = [
        Case("S=3", 3, 3),
        Case("S=5"),
        Case("S=5, SD ratio 4", sd=4),
        Case("S=5, seeds correlated .8", correlation=0.8),
        Case("S=5, skewed", shape="skewed"),
        Case("S=5, a seed's rewards correlated .3", between_rewards=0.3),
    ]
    rows = []
    for case in cases:
        n = MANY if case.seeds == 3 else N
        pairs = list(zip(*case.arms(rng, n, rewards), strict=True))
        found = []
        for test in (permutation, welch):
            level, power = (share(test(x + d, y).p < 0.05 for x, y in pairs) for d in (0.0, shift))
            if case.sd == 1 and not case.between_rewards:
                assert_at_most(level, 0.05)
            found.append(f"{level} / {power}")
        alone = [
            share(min(welch(x[r] + d, y[r]).p for r in range(rewards)) < 0.05 / rewards for x, y in pairs)
            for d in (0.0, shift)
        ]
        rows.append([case.name, *found, f"{alone[0]} / {alone[1]}"])
    columns = ["arms", "stratified permutation", "stratified Welch", "any reward alone, Bonferroni"]
    note = (
        f"{N} repetitions (S=3: {MANY}). Share of p < .05 where nothing differs / at {shift} SD on each of 4 rewards."
    )
    publish("pooled", Table(columns, rows, note))


def test_equivalence_and_constants() -> None:
    """Arms one margin apart are equivalent in 5 % at most; against a constant the one-sample t is exact."""
    a, b = np.random.default_rng(6).normal(size=(2, MANY, 5))
    apart = [tost(welch(x + 2.5, y).interval, 2.5) < 0.05 for x, y in zip(a, b, strict=True)]
    assert_at_most(share(apart), 0.05)
    assert_exact(share(tost(paired(x + 4, y).interval, 4) < 0.05 for x, y in zip(a, b, strict=True)), 0.05)
    assert_exact(share(against_constant(x, [0.0]).p < 0.05 for x in a), 0.05)


def test_intervals_of_a_difference(publish: Publish) -> None:
    """Welch's covers on the suite as it is; the crossed one also where each arm has hard prompts of its own."""
    rng = np.random.default_rng(7)
    spreads = {
        "seeds as prompts": Spread(),
        "prompts differ more than seeds": Spread(seed=0.3, prompt=2.0),
    }
    rows = []
    for name, spread in spreads.items():
        for unseen in (False, True):
            for seeds in (3, 5, 10):
                arms = [cells(rng, MANY, seeds, spread, unseen=unseen) for _ in "ab"]
                truth = arms[0][1] - arms[1][1]
                pairs = list(zip(arms[0][0], arms[1][0], strict=True))
                plain = coverage((welch(x.mean(axis=1), y.mean(axis=1)).interval for x, y in pairs), truth)
                both = coverage((crossed_difference(x, y) for x, y in pairs), truth)
                if unseen:
                    assert_at_least(both, 0.935)
                else:
                    assert_at_least(plain, 0.95)
                rows.append([name, "unseen" if unseen else "this suite", seeds, plain, both])
    columns = ["prompt effects of each arm", "prompts", "seeds", "Welch", "crossed"]
    publish("differences", Table(columns, rows, f"{MANY} repetitions of 50 prompts with 4 pictures."))
