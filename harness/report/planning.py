"""How many seeds, prompts and latents a question needs, from the variances of an earlier run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from harness.errors import UserError
from harness.report.analysis import Analysis, analyse
from harness.report.gains import arrange
from harness.report.narrative import ALPHA
from harness.report.records import HELD_OUT, Run
from harness.stats.seed_means import SeedScores
from harness.stats.variance import Contrast, contrast

MULTIPLES = (1, 2, 4)


@dataclass(frozen=True)
class Question:
    """One difference that a run asks about, in base-SD units.

    Attributes:
        arm: whose gain or difference it is. ``name``: such as ``ddpo against draft``.
        reward: the training reward, or how many are pooled. ``pooled``: whether it is about all there are.
        contrast: its variance components.
        strata: training rewards within which a permutation test relabels seeds; 0 where a t test decides.
        family: comparisons that Holm's adjustment holds together.
    """

    arm: str
    name: str
    reward: str
    pooled: bool
    contrast: Contrast
    strata: int
    family: int

    def seeds(self, difference: float, design: Design, *, unseen: bool, holm: bool, assured: bool) -> int | None:
        """Seeds per arm that find a difference with 80 % power; None where no number does.

        For unseen prompts at least as many as for this suite: prompts that vary also add degrees of freedom.
        """
        found = self.contrast.inflated(self.contrast.inflation) if assured else self.contrast
        alpha = ALPHA / self.family if holm else ALPHA
        # An exact permutation test cannot reject below this, however large the difference.
        fewest = self._fewest(alpha)
        for random in (False, True)[: 1 + unseen]:
            needed = found.seeds_needed(difference, design.prompts, design.latents, unseen=random, alpha=alpha)
            if needed is None:
                return None
            fewest = max(fewest, needed)
        return fewest

    def _fewest(self, alpha: float) -> int:
        exact = self.strata > 0
        return next(s for s in itertools.count(2) if not exact or 2 / math.comb(2 * s, s) ** self.strata <= alpha)

    def detectable(self, design: Design, *, unseen: bool) -> float:
        """Smallest difference that a design finds with 80 % power at the level of Holm's first step.

        NaN where the permutation test cannot reject with so few seeds.
        """
        size, alpha = (design.seeds, design.prompts, design.latents), ALPHA / self.family
        if design.seeds < self._fewest(alpha):
            return float("nan")
        targets = (False, True)[: 1 + unseen]
        return float(np.max([self.contrast.detectable(*size, unseen=random, alpha=alpha) for random in targets]))


@dataclass(frozen=True, eq=False)
class Pilot:
    """What a run offers to plans.

    Attributes:
        scores: (S, P, K) gains on the training reward in base SD by (arm, training reward), held-out prompts, of
            seeds that ended.
        arms: that have an answer. ``left_out``: of the others, why not.
    """

    run: Run
    scores: Mapping[tuple[str, str], SeedScores]
    arms: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def varying(self) -> tuple[str, ...]:
        """Arms with an answer and with seed variance."""
        return tuple(arm for arm in self.arms if arm not in self.run.constants)

    @property
    def design(self) -> Design:
        """The fewest seeds, prompts and latents of any varying arm."""
        tables = [self.scores[arm, reward] for arm in self.varying for reward in self.run.training_rewards]
        return Design(
            min(len(table.seeds) for table in tables),
            min(table.prompts_scored for table in tables),
            min(len(table.pictures) for table in tables),
        )


@dataclass(frozen=True)
class Design:
    """Seeds per arm, held-out prompts, and latents per prompt."""

    seeds: int
    prompts: int
    latents: int

    def times(self, seeds: int = 1, prompts: int = 1, latents: int = 1) -> Design:
        """The same in multiples."""
        return Design(self.seeds * seeds, self.prompts * prompts, self.latents * latents)

    @property
    def pictures(self) -> int:
        """Held-out pictures of a cell."""
        return self.prompts * self.latents


@dataclass(frozen=True)
class CellCost:
    """What one cell of an arm took: seconds of one worker, and seconds for each evaluated picture among them."""

    arm: str
    seconds: float
    seconds_per_picture: float
    seeded: bool


@dataclass(frozen=True)
class Plan:
    """What an earlier run says about the next.

    Attributes:
        difference: to be found, in base SD.
        design: of the earlier run, the fewest seeds of any arm that was compared.
        costs: of the arms, one for each (arm, training reward).
        left_out: sentences on arms without an answer.
    """

    run: Run
    difference: float
    design: Design
    questions: tuple[Question, ...]
    costs: tuple[CellCost, ...]
    left_out: tuple[str, ...]

    def seeds(self, design: Design, *, unseen: bool) -> int | None:
        """Seeds that answer every question, adjusted by Holm; None where some question has no such number."""
        each = [q.seeds(self.difference, design, unseen=unseen, holm=True, assured=False) for q in self.questions]
        return None if None in each else max(number for number in each if number is not None)

    def hours(self, design: Design) -> float:
        """Of one worker of the machine that the earlier run had; NaN where records do not tell."""
        more = design.pictures - self.design.pictures
        seconds = sum(
            (cost.seconds + cost.seconds_per_picture * more) * (design.seeds if cost.seeded else 1)
            for cost in self.costs
        )
        return seconds / 3600

    def cheapest(self, *, unseen: bool) -> Design | None:
        """The design of at most four times as many prompts and latents that answers all in the fewest hours."""
        designs = []
        for prompts, latents in itertools.product(MULTIPLES, MULTIPLES):
            larger = self.design.times(prompts=prompts, latents=latents)
            seeds = self.seeds(larger, unseen=unseen)
            if seeds is not None:
                designs.append(Design(seeds, larger.prompts, larger.latents))
        cost = {d: (self.hours(d) if math.isfinite(self.hours(d)) else d.seeds * d.pictures) for d in designs}
        return min(designs, key=lambda d: (cost[d], d.seeds, d.pictures), default=None)


def plan(run: Run, difference: float) -> Plan:
    """Variances of a run, turned into designs.

    Raises:
        UserError: The run cannot tell how much seeds or prompts differ, or the difference is not above 0.
    """
    if not (difference > 0 and math.isfinite(difference)):
        raise UserError(f"--detect {difference:g}: give a difference above 0, in units of the base SD, such as 0.2")
    if not run.base.counts:
        raise UserError(f"{run.name}: the base model is not scored yet, so that there are no gains; finish the run")
    found = pilot(analyse(run))
    if not found.varying:
        raise UserError(
            f"{run.name}: no arm has two seeds with scores, and one seed says nothing about the next; "
            "add some, as in --seeds 5"
        )
    design = found.design
    if design.prompts < 2:
        raise UserError(f"{run.name}: one held-out prompt says nothing about others; evaluate on two at least")
    costs = tuple(cost for arm in found.arms for reward in run.training_rewards for cost in _cost(run, arm, reward))
    return Plan(run, difference, design, questions(found), costs, found.left_out)


def pilot(analysis: Analysis) -> Pilot:
    """Scores and arms of a run, complete or not."""
    run = analysis.run
    scores = {(arm, r): _scores(analysis, arm, r) for arm in run.arms for r in run.training_rewards}
    left_out = dict(_without_an_answer(run, scores))
    arms = tuple(arm for arm in run.arms if arm not in left_out)
    return Pilot(run, scores, arms, tuple(left_out.values()))


def _scores(analysis: Analysis, arm: str, reward: str) -> SeedScores:
    """(S, P, K) gains of an arm on its training reward in base SD, held-out prompts, seeds that ended."""
    found = arrange(analysis.gains.rows(arm, reward, reward, split=HELD_OUT), "gain")
    return SeedScores(found.values / analysis.gains.sd(reward), found.seeds, found.prompts, found.pictures)


def _without_an_answer(run: Run, scores: Mapping[tuple[str, str], SeedScores]) -> list[tuple[str, str]]:
    """Arms that cannot be planned for, and why."""
    found = []
    for arm in run.arms:
        fewest = min(len(scores[arm, reward].seeds) for reward in run.training_rewards)
        if arm in run.given:
            found.append((arm, f"{arm} was made elsewhere: there are no further seeds of it."))
        elif fewest == 0 or (fewest == 1 and arm not in run.constants):
            found.append((arm, f"{arm} has {fewest} seed(s) with scores: how much seeds differ is not known."))
    return found


def questions(found: Pilot) -> tuple[Question, ...]:
    """Each arm against the reference, by training reward and pooled; the gain over the base where there is no other."""
    run, arms, scores = found.run, found.arms, found.scores
    rewards = run.training_rewards
    reference = run.reference if run.reference in arms else None
    others = [arm for arm in arms if arm != reference and not {arm, reference} <= set(run.constants)]
    alone = reference is None or not others
    pairs = len(run.arms) * (len(run.arms) - 1) // 2 * len(rewards)
    family, families = (len(arms), len(arms) * len(rewards)) if alone else (len(run.arms) - 1, pairs)
    result = []
    for arm in found.varying if alone else others:
        name = f"{arm} over base" if alone else f"{arm} against {reference}"
        for pooled in [rewards] if len(rewards) == 1 else [rewards, *((reward,) for reward in rewards)]:
            terms: list[tuple[SeedScores, float]] = []
            for reward in pooled:
                other = None if alone else scores[str(reference), reward]
                terms += _terms(run, scores[arm, reward], other, arm, reference)
            weights = [sign / len(pooled) for _, sign in terms]
            parts = contrast([table for table, _ in terms], weights)
            primary = len(pooled) == len(rewards)
            reward = pooled[0] if len(pooled) == 1 else f"mean of {len(pooled)} rewards"
            strata = len(pooled) if primary and len(terms) == 2 * len(pooled) else 0
            size = family if primary else families
            result.append(Question(arm, name, reward, primary, parts, strata, size))
    return tuple(result)


def _terms(
    run: Run, own: SeedScores, other: SeedScores | None, arm: str, reference: str | None
) -> list[tuple[SeedScores, float]]:
    """The tables of a difference with their signs; an arm without seed variance shifts the other's scores."""
    if other is None:
        return [(own, 1.0)]
    if arm in run.constants:
        return [(less(other, own), -1.0)]
    if reference in run.constants:
        return [(less(own, other), 1.0)]
    return [(own, 1.0), (other, -1.0)]


def less(scores: SeedScores, fixed: SeedScores) -> SeedScores:
    """Scores minus those of an arm with one value for each picture; NaN where that one has none."""
    places = {(p, k): fixed.values[0, i, j] for i, p in enumerate(fixed.prompts) for j, k in enumerate(fixed.pictures)}
    shift = [[places.get((p, k), np.nan) for k in scores.pictures] for p in scores.prompts]
    return SeedScores(scores.values - np.array(shift)[None], scores.seeds, scores.prompts, scores.pictures)


def _cost(run: Run, arm: str, reward: str) -> list[CellCost]:
    """Mean over the cells that ended: seconds, and those of a picture."""
    cells = [cell for cell in run.cells_of(arm, reward) if cell.counts]
    seconds = [cell.status.get("seconds", {}) for cell in cells]
    evaluate = float(np.mean([float(each.get("evaluate", np.nan)) for each in seconds]))
    whole = float(np.mean([float(each.get("train", 0.0)) + float(each.get("evaluate", np.nan)) for each in seconds]))
    mine = run.scores[run.scores["cell"].isin([cell.name for cell in cells])]
    pictures = len(mine.drop_duplicates(["cell", "variant", "point", "prompt_id", "noise_id"])) / max(len(cells), 1)
    per_picture = evaluate / pictures if pictures else float("nan")
    return [CellCost(arm, whole, per_picture, arm not in run.constants)]
