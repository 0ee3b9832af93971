"""The gate on snapshots: identical, equal up to rounding, or a paired non-inferiority test, and Holm over the cells.

Cells are matched by arm, training reward and seed, their pictures by prompt and latent, never by position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from harness.regression.snapshot import Snapshot, Trained
from harness.report.records import BASE
from harness.stats.effects import standardised
from harness.stats.gate import GateOutcome, gate
from harness.stats.intervals import NAN, Interval, join
from harness.stats.multiplicity import holm
from harness.stats.seed_means import Array, is_constant, seed_scores

ALPHA = 0.05
LEVEL = 1 - 2 * ALPHA  # each bound of the interval is a one-sided test at ALPHA
ROUNDING = 1e-6  # of the golden tier, relative


class Family(StrEnum):
    """Which question a row answers; hypotheses are adjusted within a family."""

    POOLED = "pooled"  # a method's gain on its training reward, mean over training rewards
    CELL = "cell"  # a method, what it trained on, and a reward that decides
    WATCHED = "watched"  # every other reward: shown, decides nothing


@dataclass(frozen=True)
class Row:
    """One comparison, in base-SD units of the baseline.

    Attributes:
        new, baseline: Mean gains over seeds (of the base model: mean scores).
        difference: New minus baseline with its 90 % interval; without one where there is no seed variance.
        seeds: Behind the difference; the smaller number where seeds differ.
        how: Which tier decided, and how seeds were matched.
        p_worse: One-sided, of the hypothesis that the loss is the margin or less. ``adjusted_p``: Holm in the family.
        needed: Seeds that an answer needs if nothing has changed; only where inconclusive.
        golden: Whether single pictures' scores are equal up to rounding.
    """

    family: Family
    arm: str
    training_reward: str
    reward: str
    outcome: GateOutcome
    new: float
    baseline: float
    difference: Interval
    seeds: int
    how: str
    p_worse: float = NAN
    adjusted_p: float = NAN
    needed: int | None = None
    golden: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Matched:
    """Seed values of one arm, training reward and evaluation reward in both snapshots, base-SD units.

    Attributes:
        new, baseline: (S,) by ``seeds`` where paired, else (S_new,) and (S_baseline,).
        identical: All records of all these cells are the same.
        rounding: Largest relative difference of a picture's score; NaN where scores were not kept.
        shared: Share of the pictures that both have.
        left_out: Seeds that only one side has. ``unscored``: those without a score in the new run that have one in the
            baseline, and also all of them, as NaN, where no seed of the new run has one.
    """

    new: Array
    baseline: Array
    paired: bool
    identical: bool
    rounding: float
    shared: float
    left_out: tuple[int, ...]
    unscored: tuple[int, ...] = ()

    @property
    def lacking(self) -> bool:
        """Whether something was not compared since the new run has no score of it: no proof of anything good."""
        return bool(self.unscored) or self.shared < 1


def gate_rows(new: Snapshot, baseline: Snapshot, margin: float, also: Sequence[str]) -> list[Row]:
    """All rows of the comparison: arms and the base model, pooled, by cell, and what is only watched.

    Args:
        new: Of the new run.
        baseline: What it is compared with; its base SDs are the unit.
        margin: Largest acceptable loss in base SD, positive.
        also: Evaluation rewards that decide besides the training reward.
    """
    rewards = common_rewards(new, baseline)
    trained = [reward for reward in baseline.training_rewards if reward in new.training_rewards]
    rows: list[Row] = []
    for arm, place in _places(new, baseline, trained):
        deciding = [*(trained if arm == BASE else [place]), *also]
        for reward in rewards if arm != BASE else [name for name in rewards if name in deciding]:
            matched = match(new, baseline, arm, place, reward)
            if matched is not None:
                family = Family.CELL if reward in deciding else Family.WATCHED
                fixed = _fixed(new, arm) and _fixed(baseline, arm)
                rows.append(_row(family, arm, place, reward, [matched], margin, fixed, _golden(new, baseline, matched)))
    rows += _pooled(new, baseline, margin, trained)
    return [row for family in Family for row in _adjusted([row for row in rows if row.family == family])]


def common_rewards(new: Snapshot, baseline: Snapshot) -> list[str]:
    """Rewards that scored both, in the same version: scores of another one are other numbers."""
    both = [name for name in baseline.base_sd if name in new.base_sd]
    return [name for name in both if new.rewards.get(name) == baseline.rewards.get(name)]


def _places(new: Snapshot, baseline: Snapshot, trained: Sequence[str]) -> list[tuple[str, str]]:
    """(arm, training reward) of both, in the baseline's order, the base model last."""
    known = {arm["label"] for arm in new.arms}
    arms = [str(arm["label"]) for arm in baseline.arms if arm["label"] in known]
    return [*((arm, reward) for arm in arms for reward in trained), (BASE, "")]


def _fixed(snapshot: Snapshot, arm: str) -> bool:
    """Whether an arm has no seed variance: one value, the base model's too."""
    seeded = {str(known["label"]): known.get("seeded") for known in snapshot.arms}
    return arm == BASE or seeded[arm] is False


def match(new: Snapshot, baseline: Snapshot, arm: str, training_reward: str, reward: str) -> Matched | None:
    """Seed values of both; None where one of them has no cell, the baseline no value, or both other pictures.

    Paired over the seeds that both have where these are at least two (or the arm has but one); otherwise all seeds of
    either side, as independent samples.
    """
    ours, theirs = (_with(side, arm, training_reward, reward) for side in (new, baseline))
    there = new.find(arm, training_reward)
    if not there or not theirs:
        return None
    unscored = tuple(sorted(there.keys() - ours.keys())) if ours else tuple(sorted(there))
    if not ours:
        known = standardised([theirs[s].scored[reward].value for s in sorted(theirs)], baseline.base_sd[reward])
        return Matched(np.full(len(there), NAN), known, False, False, NAN, 0.0, (), unscored)
    common = sorted(ours.keys() & theirs.keys())
    paired = len(common) >= min(2, len(ours), len(theirs))
    if not common:
        paired = False
    mine, yours = (common, common) if paired else (sorted(ours), sorted(theirs))
    left_out = tuple(sorted(ours.keys() ^ theirs.keys())) if paired else ()
    mask = _shared_pairs(new, baseline, [*(ours[s] for s in mine)], [*(theirs[s] for s in yours)], reward)
    if mask is None and new.pairs != baseline.pairs:
        return None  # gains as stored are means over other pictures
    sd = baseline.base_sd[reward]
    values = [
        standardised(_values(side, cells, seeds, reward, where), sd)
        for side, cells, seeds, where in (
            (new, ours, mine, mask[0] if mask else None),
            (baseline, theirs, yours, mask[1] if mask else None),
        )
    ]
    same = paired and _same_base(new, baseline, reward)  # a gain depends on the base model's scores, too
    same = same and all(ours[s].scored[reward].sha256 == theirs[s].scored[reward].sha256 for s in common)
    off = _rounding(new, baseline, ours, theirs, common, reward) if paired and mask else NAN
    kept = len(mask[0]) / max(len(new.pairs), len(baseline.pairs), 1) if mask else 1.0
    return Matched(values[0], values[1], paired, same, off, kept, left_out, unscored)


def _same_base(new: Snapshot, baseline: Snapshot, reward: str) -> bool:
    ours, theirs = ([cell.scored[reward].sha256 for cell in side.find(BASE, "").values()] for side in (new, baseline))
    return ours == theirs


def _with(side: Snapshot, arm: str, training_reward: str, reward: str) -> dict[int, Trained]:
    """Cells that have a value, by seed."""
    found = side.find(arm, training_reward)
    return {s: c for s, c in found.items() if reward in c.scored and math.isfinite(c.scored[reward].value)}


def _shared_pairs(
    new: Snapshot, baseline: Snapshot, ours: list[Trained], theirs: list[Trained], reward: str
) -> tuple[list[int], list[int]] | None:
    """Places, in either snapshot, of the pictures that every cell and the base model has; None without scores."""
    places = []
    for side, cells in ((new, ours), (baseline, theirs)):
        kept = [cell.scored[reward].scores for cell in [*cells, *side.find(BASE, "").values()]]
        if not side.find(BASE, "") or any(scores is None or not np.isfinite(scores).any() for scores in kept):
            return None
        there = np.logical_and.reduce([np.isfinite(scores) for scores in kept if scores is not None])
        places.append({pair: i for i, pair in enumerate(side.pairs) if there[i]})
    shared = [pair for pair in places[0] if pair in places[1]]
    return ([places[0][pair] for pair in shared], [places[1][pair] for pair in shared]) if shared else None


def _values(
    side: Snapshot, cells: Mapping[int, Trained], seeds: Sequence[int], reward: str, places: list[int] | None
) -> Array:
    """(S,) gain over the base model on these pictures, or as stored; of the base model its mean score."""
    stored = np.array([cells[seed].scored[reward].value for seed in seeds])
    base = next(iter(side.find(BASE, "").values()), None)
    if places is None or base is None:
        return stored
    reference = base.scored[reward].scores
    own = [cells[seed].scored[reward].scores for seed in seeds]
    table = np.array([scores[places] for scores in own if scores is not None])
    if cells[seeds[0]].arm != BASE and reference is not None:
        table = table - reference[places]
    prompts, pictures = zip(*(side.pairs[place] for place in places), strict=True)
    count = len(places)
    arranged = seed_scores(
        table.ravel(), seed=np.repeat(np.arange(len(seeds)), count), prompt=np.tile(prompts, len(seeds)),
        picture=np.tile(pictures, len(seeds)),
    )  # fmt: skip
    return arranged.means


def _rounding(
    new: Snapshot,
    baseline: Snapshot,
    ours: Mapping[int, Trained],
    theirs: Mapping[int, Trained],
    seeds: Sequence[int],
    reward: str,
) -> float:
    """Largest relative difference of a score; infinite where one side has a picture that the other lacks."""
    if new.pairs != baseline.pairs:
        return math.inf
    worst = 0.0
    for seed in seeds:
        x, y = ours[seed].scored[reward].scores, theirs[seed].scored[reward].scores
        if x is None or y is None or not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return math.inf
        size = np.maximum(np.abs(x), np.abs(y))
        off = np.divide(np.abs(x - y), size, out=np.zeros_like(x), where=size > 0)
        worst = max(worst, float(np.nanmax(off)))
    return worst


def _golden(new: Snapshot, baseline: Snapshot, matched: Matched) -> str:
    """The first tier in words."""
    moved = [key for key in baseline.platform if new.platform.get(key) != baseline.platform[key]]
    if moved:
        return f"skipped: other {', '.join(moved)}"
    if not matched.paired:
        return "skipped: other seeds"
    if math.isnan(matched.rounding):
        return "skipped: single scores were not kept"
    if matched.rounding <= ROUNDING:
        return "equal"
    return f"differs by up to {matched.rounding:.2g}" if math.isfinite(matched.rounding) else "other pictures"


def _pooled(new: Snapshot, baseline: Snapshot, margin: float, trained: Sequence[str]) -> list[Row]:
    """Each arm's gain on what it was trained on, mean over training rewards; nothing to pool if there is one."""
    rows: list[Row] = []
    if len(trained) < 2:
        return rows
    for arm in dict.fromkeys(arm for arm, _ in _places(new, baseline, trained) if arm != BASE):
        found = [match(new, baseline, arm, reward, reward) for reward in trained if reward in baseline.base_sd]
        every = [matched for matched in found if matched is not None]
        if every and len(every) == len(trained):
            fixed = _fixed(new, arm) and _fixed(baseline, arm)
            rows.append(_row(Family.POOLED, arm, "", "its training rewards", every, margin, fixed, ""))
    return rows


def _row(
    family: Family,
    arm: str,
    training_reward: str,
    reward: str,
    every: Sequence[Matched],
    margin: float,
    fixed: bool,
    golden: str,
) -> Row:
    """Judge one comparison, before the adjustment for others; what has no score in the new run may have lost."""
    row = _judged(family, arm, training_reward, reward, every, margin, fixed, golden)
    if any(m.lacking for m in every) and row.outcome is not GateOutcome.WORSE:
        row = replace(row, outcome=GateOutcome.INCONCLUSIVE, needed=None)
    return row


def _judged(
    family: Family,
    arm: str,
    training_reward: str,
    reward: str,
    every: Sequence[Matched],
    margin: float,
    fixed: bool,
    golden: str,
) -> Row:
    ours, theirs = [m.new for m in every], [m.baseline for m in every]
    new, baseline = (float(np.mean([values.mean() for values in side])) for side in (ours, theirs))
    paired = all(m.paired for m in every)
    seeds = min(min(len(m.new), len(m.baseline)) for m in every)
    row = Row(
        family, arm, training_reward, reward, GateOutcome.INCONCLUSIVE, new, baseline,
        Interval(new - baseline, NAN, NAN, LEVEL, seeds), seeds, "", golden=golden, note=_note(every, baseline),
    )  # fmt: skip
    if all(m.identical for m in every):
        same = Interval(0.0, 0.0, 0.0, LEVEL, seeds)
        return replace(row, outcome=GateOutcome.IDENTICAL, difference=same, how="identical records")
    largest = max(float(np.abs(m.new - m.baseline).max()) if m.paired else math.inf for m in every)
    if all(m.rounding <= ROUNDING for m in every) and largest < margin:
        return replace(row, outcome=GateOutcome.EQUIVALENT, how="equal up to rounding")
    if fixed:
        return replace(row, outcome=_exact(new - baseline, margin), how="one value each, no seed variance")
    if all(m.paired and is_constant(m.new - m.baseline) for m in every) and 0.5**seeds < ALPHA:
        # Such as a base model that moved. Fewer seeds can agree by chance where a reward has few values (sign test).
        return replace(row, outcome=_exact(new - baseline, margin), how=f"paired, {seeds} seeds with one difference")
    # Where only some strata share seeds, all are taken as independent: conservative where they are not.
    result = gate(ours, theirs, margin, alpha=ALPHA, same_seeds=paired)
    counts = " and ".join(dict.fromkeys(str(min(map(len, side))) for side in (ours, theirs)))
    how = f"paired, {counts} seeds" if paired else f"Welch, {counts} seeds"
    note = join(row.note, "" if result.difference.df > 0 else result.difference.note)
    return replace(
        row,
        outcome=GateOutcome.EQUIVALENT if result.outcome is GateOutcome.IDENTICAL else result.outcome,  # records differ
        difference=result.difference,
        how=how,
        p_worse=result.difference.p_value(-margin, "less"),
        needed=result.seeds_needed,
        note=note,
    )


def _exact(difference: float, margin: float) -> GateOutcome:
    """Without seed variance the difference is known; NaN (no base SD) decides nothing."""
    if math.isnan(difference):
        return GateOutcome.INCONCLUSIVE
    if abs(difference) < margin:
        return GateOutcome.EQUIVALENT
    return GateOutcome.IMPROVED if difference > 0 else GateOutcome.WORSE


def _note(every: Sequence[Matched], baseline: float) -> str:
    unscored = sorted({seed for m in every for seed in m.unscored})
    left = sorted({seed for m in every for seed in m.left_out} - set(unscored))
    shared = min(m.shared for m in every)
    return join(
        "" if math.isfinite(baseline) else "the base model's scores have no spread, the unit of the margin",
        f"no score in the new run: seeds {', '.join(map(str, unscored))}" if unscored else "",
        f"without seeds that only one side has: {', '.join(map(str, left))}" if left else "",
        f"on the {shared:.0%} of pictures that both have" if 0 < shared < 1 else "",
    )


def _adjusted(rows: list[Row]) -> list[Row]:
    """WORSE only where Holm's p over the tested rows of the family says so; what was decided exactly needs no test."""
    tested = [row for row in rows if math.isfinite(row.p_worse)]
    adjusted = dict(zip(map(id, tested), holm([row.p_worse for row in tested]).tolist(), strict=True))
    result = []
    for row in rows:
        p = adjusted.get(id(row), NAN)
        if row.outcome is GateOutcome.WORSE and math.isfinite(p) and p >= ALPHA:
            note = join(row.note, "below the margin by itself, not after Holm's adjustment")
            row = replace(row, outcome=GateOutcome.INCONCLUSIVE, note=note)
        result.append(replace(row, adjusted_p=p))
    return result
