"""From records to seed values: gains over the base model on identical prompts and latents, by intention to treat.

Every number of the report comes from here; the statistics themselves live in `harness.stats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.report.columns import Groups, on_identical_pairs
from harness.report.records import BASE, DEFAULT_VARIANT, FINAL, HELD_OUT, Cell, Run
from harness.stats.effects import standardised
from harness.stats.intervals import Interval, seed_t
from harness.stats.seed_means import Array, IntentionToTreat, SeedScores, base_sd, intention_to_treat, seed_scores
from harness.watching import END, START

TRAINING = "training"
OWN_SAMPLER, OWN_SAMPLER_BASE = "own-sampler", "own-sampler-base"
GROUP = ("variant", "arm", "training_reward", "reward", "split")
SPENT = ("queries", "denoiser_rows", "train_seconds")


@dataclass(frozen=True, eq=False)
class Gain:
    """The gain of one arm, trained on one reward and scored by another, seed by seed.

    Attributes:
        seeds: The S planned seeds. ``states``: how each ended.
        runs: (S,) gains in the reward's unit, every planned run in its place (NaN: not finished or crashed).
        base_mean: Mean of the base model on the same prompts and latents. ``sd``: its spread within a prompt.
        prompts: Prompts that the reward applies to. ``pictures``: pictures per seed.
    """

    arm: str
    training_reward: str
    reward: str
    split: str
    seeds: tuple[int, ...]
    states: tuple[str, ...]
    runs: IntentionToTreat
    base_mean: float
    sd: float
    prompts: int
    pictures: int

    @property
    def values(self) -> Array:
        """(S,) gains in the reward's unit."""
        return self.runs.values

    @property
    def standardised(self) -> Array:
        """(S,) gains in units of the base model's spread within a prompt."""
        return standardised(self.values, self.sd)

    @property
    def interval(self) -> Interval:
        """Mean gain with its t interval over seeds."""
        return seed_t(self.values)

    @property
    def exists(self) -> bool:
        """Whether any seed has a value."""
        return bool(np.isfinite(self.values).any())


@dataclass(frozen=True, eq=False)
class Curve:
    """The gain along training, on the pictures that all its points and the base model share.

    Attributes:
        seeds: The S seeds that have a curve.
        values: (S, G) gains in the reward's unit; NaN where a point is missing. A diverged run keeps, after it broke
            off, the gain of its last finite checkpoint.
        spent: (S, G) of queries, denoiser rows and training seconds really spent until then.
        prompts, pictures: what each point is a mean of.
    """

    arm: str
    training_reward: str
    reward: str
    seeds: tuple[int, ...]
    values: Array
    spent: Mapping[str, Array]
    prompts: int
    pictures: int


@dataclass(frozen=True, eq=False)
class Gains:
    """All gains of a run."""

    run: Run
    _finals: dict[tuple[str, ...], Gain] = field(default_factory=dict, init=False, repr=False)
    _curves: dict[tuple[str, ...], Curve] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _base(self) -> pd.DataFrame:
        scores = self.run.scores
        return scores[(scores["arm"] == BASE) & (scores["point"] == FINAL) & (scores["variant"] == DEFAULT_VARIANT)]

    @cached_property
    def _groups(self) -> Groups:
        """Rows of tuned cells with `base` and `gain` (NaN where the base has no such picture)."""
        scores = self.run.scores
        tuned = scores[scores["arm"] != BASE]
        base = on_identical_pairs(tuned, self._base)
        return Groups(tuned.assign(base=base, gain=tuned["score"].to_numpy(dtype=np.float64) - base), GROUP)

    def variants(self) -> tuple[str, ...]:
        """Ways of generating that tuned cells were evaluated with, the default first."""
        seen = sorted({key[0] for key in self._groups.keys} - {DEFAULT_VARIANT})
        return (DEFAULT_VARIANT, *seen)

    def base_scores(self, reward: str, split: str | None = None) -> SeedScores:
        """The base model's scores by prompt and latent, of one split or of all."""
        key = (reward, split)
        if key not in self._base_scores:
            rows = self._base[self._base["reward"] == reward]
            self._base_scores[key] = arrange(rows if split is None else rows[rows["split"] == split], "score")
        return self._base_scores[key]

    @cached_property
    def _base_scores(self) -> dict[tuple[str, str | None], SeedScores]:
        return {}

    @cached_property
    def _sds(self) -> dict[str, float]:
        return {info.name: self._sd(info.name) for info in self.run.rewards}

    def _sd(self, reward: str) -> float:
        scores = self.base_scores(reward)
        if not scores.values.size:
            return float("nan")
        within = base_sd(scores)
        if np.isfinite(within) or not self.one_latent:
            return within
        values = scores.values[np.isfinite(scores.values)]
        return float(values.std(ddof=1)) if len(values) > 1 and np.ptp(values) > 0 else float("nan")

    @cached_property
    def one_latent(self) -> bool:
        """Whether every prompt was scored with one latent: the unit is then the spread over prompts."""
        base = self._base
        return bool(base.groupby("prompt_id", observed=True)["noise_id"].nunique().max() == 1) if len(base) else False

    @cached_property
    def first_latents(self) -> dict[str, int]:
        """The base model's first latent of each prompt: the one that pictures are shown for."""
        found = self._base.groupby("prompt_id", observed=True)["noise_id"].min()
        return {str(prompt): int(noise) for prompt, noise in found.items()}

    def sd(self, reward: str) -> float:
        """The base SD, unit of standardised gains: spread of the base model's pictures within a prompt.

        Where every prompt has a single latent there is no such spread, and that over all pictures is used.
        """
        return self._sds.get(reward, float("nan"))

    @cached_property
    def _scored(self) -> frozenset[str]:
        return frozenset(map(str, self._base["reward"].unique()))

    def scored(self, reward: str) -> bool:
        """Whether the base model was scored by this reward, so that gains exist."""
        return reward in self._scored

    def final(
        self,
        arm: str,
        training_reward: str,
        reward: str,
        *,
        split: str = HELD_OUT,
        variant: str = DEFAULT_VARIANT,
        point: str = FINAL,
    ) -> Gain:
        """The gain at the end of the budget, or at another point of the curve (on that point's pictures)."""
        key = (variant, arm, training_reward, reward, split, point)
        if key not in self._finals:
            self._finals[key] = self._final(*key)
        return self._finals[key]

    def _final(self, variant: str, arm: str, training_reward: str, reward: str, split: str, point: str) -> Gain:
        rows = self.rows(arm, training_reward, reward, split=split, variant=variant, point=point)
        scores = arrange(rows, "gain")
        by_seed = dict(zip(scores.seeds, scores.means, strict=True))
        cells = self.run.cells_of(arm, training_reward)
        base = rows[["prompt_id", "noise_id", "base"]].iloc[np.unique(_pair_codes(rows), return_index=True)[1]]
        fallback = 0.0 if self.scored(reward) else float("nan")
        return Gain(
            arm,
            training_reward,
            reward,
            split,
            tuple(cell.seed for cell in cells),
            tuple(cell.state for cell in cells),
            intention_to_treat([by_seed.get(cell.seed, np.nan) for cell in cells], _states(cells), fallback),
            _base_mean(base) if len(base) else _mean(self.base_scores(reward, split)),
            self.sd(reward),
            scores.prompts_scored,
            len(base),
        )

    def rows(
        self,
        arm: str,
        training_reward: str,
        reward: str,
        *,
        split: str = HELD_OUT,
        variant: str = DEFAULT_VARIANT,
        point: str | None = FINAL,
    ) -> pd.DataFrame:
        """Scored pictures of an arm with `base` and `gain`, where the base has the same picture.

        ``point``: `end` is the end of training on the pictures that the curve has, too; None: all points.
        """
        rows = self._groups.rows((variant, arm, training_reward, reward, split))
        known = rows["base"].notna().to_numpy()
        rows = rows if known.all() else rows[known]  # copying all columns is what takes time
        if point == END:
            along = rows[rows["point"] != FINAL][["prompt_id", "noise_id"]].drop_duplicates()
            last = rows[rows["point"] == FINAL]
            shared = pd.MultiIndex.from_frame(along)
            return last[pd.MultiIndex.from_frame(last[["prompt_id", "noise_id"]]).isin(shared)] if len(along) else last
        return rows if point is None else rows[rows["point"] == point]

    def curve(self, arm: str, training_reward: str, reward: str, *, split: str = HELD_OUT) -> Curve:
        """The gain at every point of the budget's grid, on the pictures that all points of the arm's cells share."""
        key = (arm, training_reward, reward, split)
        if key not in self._curves:
            self._curves[key] = self._curve(*key)
        return self._curves[key]

    def _curve(self, arm: str, training_reward: str, reward: str, split: str) -> Curve:
        rows = self.rows(arm, training_reward, reward, split=split, point=None)
        points = sorted({str(p) for p in rows["point"].unique() if p != FINAL}, key=float)
        if points:
            pairs, met = _pair_codes(rows), np.zeros(0, dtype=np.int64)
            for point in points:
                met = np.concatenate([met, np.unique(pairs[(rows["point"] == point).to_numpy()])])
            number = np.bincount(met, minlength=int(pairs.max()) + 1)
            rows = rows[number[pairs] == len(points)]
        budget = self.run.plan.get("budget", {}).get("amount")
        if not points or budget is None or float(points[-1]) < float(budget):
            points.append(FINAL)
        cells = [cell for cell in self.run.cells_of(arm, training_reward) if cell.counts]
        values = np.full((len(cells), len(points)), np.nan)
        spent = {name: np.full(values.shape, np.nan) for name in SPENT}
        places = {cell.name: i for i, cell in enumerate(cells)}
        groups = _by_cell_and_point(rows)
        for (name, point), (mean, until) in groups.items():
            if name in places and point in points:
                i, j = places[name], points.index(point)
                values[i, j] = mean
                for currency, amount in zip(SPENT, until, strict=True):
                    spent[currency][i, j] = amount
        for i, cell in enumerate(cells):
            if cell.state == "diverged":
                last = groups[cell.name, FINAL][0] if (cell.name, FINAL) in groups else np.nan
                values[i, ~np.isfinite(values[i])] = last if np.isfinite(last) else 0.0
        seeds = tuple(cell.seed for cell in cells)
        pictures = len(np.unique(_pair_codes(rows)))
        return Curve(arm, training_reward, reward, seeds, values, spent, int(rows["prompt_id"].nunique()), pictures)

    def own_sampler(self, arm: str, training_reward: str, reward: str) -> Array:
        """(S,) gains over the base model where both use the sampler that the method trained with; NaN where not made.

        On held-out prompts, seed by seed; the base's pictures with that sampler are the cell's own.
        """
        own, base = (
            _means(self._groups.rows((variant, arm, training_reward, reward, HELD_OUT)))
            for variant in (OWN_SAMPLER, OWN_SAMPLER_BASE)
        )
        seeds = [cell.seed for cell in self.run.cells_of(arm, training_reward)]
        return np.asarray([own.get(seed, np.nan) - base.get(seed, np.nan) for seed in seeds], dtype=np.float64)

    def metric(self, arm: str, training_reward: str, name: str, *, point: str = FINAL) -> Array:
        """(S,) mean over prompts of a metric (diversity, drift), by planned seed; NaN where missing."""
        cells = self.run.cells_of(arm, training_reward)
        found = [self._metrics.get((name, point, cell.name), np.nan) for cell in cells]
        return np.asarray(found, dtype=np.float64)

    @cached_property
    def _metrics(self) -> dict[tuple[str, str, str], float]:
        """Means over prompts by metric, point and cell, of the default variant."""
        table = self.run.metrics
        mine = table[table["variant"] == DEFAULT_VARIANT]
        means = mine.groupby(["metric", "point", "cell"], observed=True)["value"].mean().reset_index()
        keys = zip(means["metric"], means["point"], means["cell"], strict=True)
        return {(str(m), str(p), str(c)): float(v) for (m, p, c), v in zip(keys, means["value"], strict=True)}

    def metric_points(self, name: str) -> tuple[str, ...]:
        """Points of training at which a metric was taken, in their order, the end last.

        All are on the same pictures: `end` is the end of training on those, where there is one; the base model's are
        at `0`, which is not among them. `final` is on others, so that its diversity is not comparable.
        """
        seen = {point for metric, point, _ in self._metrics if metric == name} - {START}
        last = END if END in seen else FINAL
        along = sorted((point for point in seen - {END, FINAL}), key=float)
        return (*along, *([last] if last in seen else []))

    def base_metric(self, name: str, *, point: str = FINAL) -> float:
        """The base model's mean over prompts of a metric, also at `0`; NaN where it has none."""
        table = self._measured_base
        mine = table[(table["metric"] == name) & (table["point"] == point)]
        return float(mine["value"].mean()) if len(mine) else float("nan")

    @cached_property
    def _measured_base(self) -> pd.DataFrame:
        return self.run.metrics[self.run.metrics["arm"] == BASE]


def arrange(rows: pd.DataFrame, column: str) -> SeedScores:
    """One reward's rows of one arm, split and point as (S, P, K) by identity."""
    prompts = rows["prompt_id"].astype("category").cat
    found = seed_scores(
        rows[column].to_numpy(dtype=np.float64),
        seed=rows["seed"].to_numpy(dtype=np.int64),
        prompt=prompts.codes.to_numpy(),
        picture=rows["noise_id"].to_numpy(dtype=np.int64),
    )
    names = tuple(prompts.categories[np.asarray(found.prompts, dtype=np.int64)].astype(str))
    return SeedScores(found.values, found.seeds, names, found.pictures)


def _pair_codes(rows: pd.DataFrame) -> NDArray[np.int64]:
    """(N,) a number for each (prompt, latent), which copies of a picture share."""
    prompts = rows["prompt_id"].astype("category").cat.codes.to_numpy().astype(np.int64)
    latents = rows["noise_id"].to_numpy(dtype=np.int64)
    return np.asarray(prompts * (int(latents.max(initial=0)) + 1) + latents, dtype=np.int64)


def _by_cell_and_point(rows: pd.DataFrame) -> dict[tuple[str, str], tuple[float, list[float]]]:
    """Each cell's mean gain at each point, and what it had spent until then."""
    cells, points = (rows[name].astype("category").cat for name in ("cell", "point"))
    codes = cells.codes.to_numpy().astype(np.int64) * (len(points.categories) + 1) + points.codes.to_numpy()
    _, first, places = np.unique(codes, return_index=True, return_inverse=True)
    named = zip(rows["cell"].iloc[first], rows["point"].iloc[first], strict=True)
    keys = [(str(cell), str(point)) for cell, point in named]
    means = arrange(rows[["prompt_id", "noise_id", "gain"]].assign(seed=places), "gain").means
    spent = rows[list(SPENT)].to_numpy(dtype=np.float64)[first].tolist()
    return dict(zip(keys, zip(means.tolist(), spent, strict=True), strict=True))


def _means(rows: pd.DataFrame) -> dict[object, float]:
    """Mean score by seed."""
    scores = arrange(rows, "score")
    return dict(zip(scores.seeds, scores.means.tolist(), strict=True))


def _states(cells: tuple[Cell, ...]) -> list[str]:
    """What was not finished has no value, like what crashed; the inventory tells them apart."""
    return [cell.state if cell.counts else "crashed" for cell in cells]


def _base_mean(rows: pd.DataFrame) -> float:
    scores = arrange(rows.assign(seed=0), "base")
    return float(scores.means[0])


def _mean(scores: SeedScores) -> float:
    return float(scores.means[0]) if len(scores.seeds) else float("nan")
