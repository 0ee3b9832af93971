"""What the report says about a run: the declared families of comparisons and the matrices, computed once.

Families (declared before looking at any result):

- primary: every arm against the reference arm, gain on the training reward pooled over training rewards, stratified
  permutation test, Holm;
- secondary: all pairs of arms for each training reward, Welch's test, Holm;
- exploratory: every gain on a reward that was not trained on, Benjamini-Hochberg.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.report.gains import Gain, Gains
from harness.report.records import RewardInfo, Run
from harness.stats.intervals import Interval, seed_t
from harness.stats.matrix import Generalisation, generalisation
from harness.stats.seed_means import Array
from harness.stats.verdict import Judgement, Pair, Procedure, judge

MARGIN = 0.1
HELD_OUT_SUFFIX = "-heldout"
DIVERSITY = "vendi"


@dataclass(frozen=True, eq=False)
class Analysis:
    """A run, its gains and the judgements on them.

    Attributes:
        primary: Each arm against the reference, in the order of the run. ``secondary``: by training reward.
        matrices: Per arm, gains on all evaluation rewards in base-SD units.
    """

    run: Run
    gains: Gains
    primary: tuple[Judgement, ...]
    secondary: Mapping[str, tuple[Judgement, ...]]
    matrices: Mapping[str, Generalisation]

    @cached_property
    def rewards(self) -> dict[str, RewardInfo]:
        """Evaluation rewards that the base model was scored with, by name, training rewards first."""
        order = ordered_rewards(self.run)
        return {info.name: info for info in order if self.gains.scored(info.name)}

    def unit(self, reward: str) -> str:
        """Unit of a reward's score."""
        return next((info.unit for info in self.run.rewards if info.name == reward), "score")

    def gold(self) -> list[str]:
        """Names of the gold metrics that were scored."""
        return [name for name, info in self.rewards.items() if info.role == "gold"]

    def witnesses(self, training_reward: str) -> list[str]:
        """Held-out measure of a training reward (if there is one), then the gold metrics."""
        held_out = held_out_name(self, training_reward)
        return ([held_out] if held_out else []) + self.gold()

    def final(self, arm: str, training_reward: str, reward: str | None = None, *, split: str = "held-out") -> Gain:
        """Final gain on held-out prompts, on the training reward unless told."""
        return self.gains.final(arm, training_reward, reward or training_reward, split=split)

    def pooled(self, arm: str, rewards: list[tuple[str, str]], *, standardise: bool = True) -> Interval:
        """Mean gain over (training reward, evaluation reward) pairs, stratified t over seeds."""
        found = [self.final(arm, trained, scored) for trained, scored in rewards]
        groups = [gain.standardised if standardise else gain.values for gain in found]
        return seed_t(groups) if groups else Interval(float("nan"), float("nan"), float("nan"))

    def diversity(self, arm: str, training_reward: str) -> Array:
        """(S,) Vendi score by seed."""
        return self.gains.metric(arm, training_reward, DIVERSITY)


def held_out_name(analysis: Analysis, training_reward: str) -> str | None:
    """The held-out measure of the same thing as a training reward, by its name."""
    name = training_reward + HELD_OUT_SUFFIX
    info = analysis.rewards.get(name)
    return name if info and info.role == "held-out" else None


def ordered_rewards(run: Run) -> list[RewardInfo]:
    """Training rewards, each followed by its held-out measure; then gold; then the others."""
    infos = {info.name: info for info in run.rewards}
    order: list[str] = []
    for name in run.training_rewards:
        order += [name, name + HELD_OUT_SUFFIX]
    order += [name for name, info in infos.items() if info.role == "gold"]
    order += list(infos)
    return [infos[name] for name in dict.fromkeys(order) if name in infos]


def analyse(run: Run) -> Analysis:
    """Run all declared comparisons."""
    gains = Gains(run)
    values = {
        (arm, reward): gains.final(arm, reward, reward).standardised
        for arm in run.arms
        for reward in run.training_rewards
    }

    def pair(arm: str, reference: str, rewards: tuple[str, ...]) -> Pair:
        return Pair(
            arm,
            reference,
            [values[arm, reward] for reward in rewards],
            [values[reference, reward] for reward in rewards],
            MARGIN,
            arm in run.constants,
            reference in run.constants,
        )

    others = [arm for arm in run.arms if arm != run.reference]
    primary = judge([pair(arm, run.reference, run.training_rewards) for arm in others])
    combinations = list(itertools.combinations(run.arms, 2))
    keys = [(reward, first, second) for reward in run.training_rewards for first, second in combinations]
    family = judge([pair(first, second, (reward,)) for reward, first, second in keys], Procedure.WELCH)
    secondary: dict[str, list[Judgement]] = {reward: [] for reward in run.training_rewards}
    for (reward, _, _), judgement in zip(keys, family, strict=True):
        secondary[reward].append(judgement)
    partial = Analysis(run, gains, primary, {r: tuple(found) for r, found in secondary.items()}, {})
    return Analysis(run, gains, primary, partial.secondary, {arm: _matrix(partial, arm) for arm in run.arms})


def _matrix(analysis: Analysis, arm: str) -> Generalisation:
    """Gains of one arm in base-SD units; rewards without any gain in the run are left out as columns."""
    rows, columns = analysis.run.training_rewards, list(analysis.rewards)
    found = [[analysis.final(arm, row, column).standardised for column in columns] for row in rows]
    width = max((len(values) for line in found for values in line), default=0)
    table = np.full((len(rows), len(columns), max(width, 1)), np.nan)
    for i, line in enumerate(found):
        for j, values in enumerate(line):
            table[i, j, : len(values)] = values
    return generalisation(table, rows, columns)
