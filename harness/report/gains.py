"""From records to seed values: gains over the base model on identical prompts and latents, by intention to treat.

Every number of the report comes from here; the statistics themselves live in `harness.stats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from harness.report.records import BASE, DEFAULT_VARIANT, FINAL, HELD_OUT, Cell, Run
from harness.stats.effects import standardised
from harness.stats.intervals import Interval, seed_t
from harness.stats.seed_means import Array, IntentionToTreat, SeedScores, base_sd, intention_to_treat, seed_scores

TRAINING = "training"
OWN_SAMPLER, OWN_SAMPLER_BASE = "own-sampler", "own-sampler-base"
PAIR = ["split", "prompt_id", "noise_id", "reward"]
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
        return scores[(scores["arm"] == BASE) & (scores["point"] == FINAL)]

    @cached_property
    def _differences(self) -> Mapping[tuple[str, ...], pd.DataFrame]:
        """Rows with `gain`, by (variant, arm, training reward, reward, split)."""
        scores = self.run.scores
        tuned = scores[scores["arm"] != BASE].astype({"noise_id": "int64"})
        lookup = self._base[self._base["variant"] == DEFAULT_VARIANT][[*PAIR, "score"]]
        lookup = lookup.astype({"noise_id": "int64"}).drop_duplicates(PAIR).rename(columns={"score": "base"})
        merged = tuned.merge(lookup, on=PAIR, how="inner", validate="many_to_one")
        merged["gain"] = merged["score"].astype(float) - merged["base"].astype(float)
        grouped = merged.groupby(["variant", "arm", "training_reward", "reward", "split"], sort=True)
        return {tuple(str(part) for part in key): rows for key, rows in grouped}

    def variants(self) -> tuple[str, ...]:
        """Ways of generating that tuned cells were evaluated with, the default first."""
        seen = sorted({key[0] for key in self._differences} - {DEFAULT_VARIANT})
        return (DEFAULT_VARIANT, *seen)

    def base_scores(self, reward: str, split: str | None = None) -> SeedScores:
        """The base model's scores by prompt and latent, of one split or of all."""
        rows = self._base[(self._base["variant"] == DEFAULT_VARIANT) & (self._base["reward"] == reward)]
        rows = rows if split is None else rows[rows["split"] == split]
        return _arrange(rows, "score")

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
        return bool(self._base.groupby("prompt_id")["noise_id"].nunique().max() == 1) if len(self._base) else False

    def sd(self, reward: str) -> float:
        """The base SD, unit of standardised gains: spread of the base model's pictures within a prompt.

        Where every prompt has a single latent there is no such spread, and that over all pictures is used.
        """
        return self._sds.get(reward, float("nan"))

    def scored(self, reward: str) -> bool:
        """Whether the base model was scored by this reward, so that gains exist."""
        return bool((self._base["reward"] == reward).any())

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
        rows = self._rows(variant, arm, training_reward, reward, split)
        rows = rows[rows["point"] == point]
        scores = _arrange(rows, "gain")
        by_seed = dict(zip(scores.seeds, scores.means, strict=True))
        cells = self.run.cells_of(arm, training_reward)
        base = rows.drop_duplicates(PAIR)
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

    def curve(self, arm: str, training_reward: str, reward: str, *, split: str = HELD_OUT) -> Curve:
        """The gain at every point of the budget's grid, on the pictures that all points of the arm's cells share."""
        key = (arm, training_reward, reward, split)
        if key not in self._curves:
            self._curves[key] = self._curve(*key)
        return self._curves[key]

    def _curve(self, arm: str, training_reward: str, reward: str, split: str) -> Curve:
        rows = self._rows(DEFAULT_VARIANT, arm, training_reward, reward, split)
        points = sorted({p for p in rows["point"] if p != FINAL}, key=float)
        if points:
            keys = list(zip(rows["prompt_id"], rows["noise_id"], strict=True))
            met: dict[str, set[tuple[str, int]]] = {point: set() for point in points}
            for point, pair in zip(rows["point"], keys, strict=True):
                met.get(point, set()).add(pair)
            shared = set.intersection(*met.values())
            rows = rows[[pair in shared for pair in keys]]
        amount = self.run.plan.get("budget", {}).get("amount")
        if not points or amount is None or float(points[-1]) < float(amount):
            points.append(FINAL)
        cells = [cell for cell in self.run.cells_of(arm, training_reward) if cell.counts]
        values = np.full((len(cells), len(points)), np.nan)
        spent = {name: np.full(values.shape, np.nan) for name in SPENT}
        groups = {(str(c), str(p)): found for (c, p), found in rows.groupby(["cell", "point"])}
        for i, cell in enumerate(cells):
            last = _only_mean(groups.get((cell.name, FINAL)))
            for j, point in enumerate(points):
                here = groups.get((cell.name, point))
                values[i, j] = _only_mean(here)
                for name in SPENT:
                    spent[name][i, j] = float(here[name].iloc[0]) if here is not None else np.nan
                if cell.state == "diverged" and not np.isfinite(values[i, j]):
                    values[i, j] = last if np.isfinite(last) else 0.0
        pairs = rows.drop_duplicates(["prompt_id", "noise_id"])
        seeds = tuple(cell.seed for cell in cells)
        return Curve(arm, training_reward, reward, seeds, values, spent, int(pairs["prompt_id"].nunique()), len(pairs))

    def own_sampler(self, arm: str, training_reward: str, reward: str) -> Array:
        """(S,) gains over the base model where both use the sampler that the method trained with; NaN where not made.

        On held-out prompts, seed by seed; the base's pictures with that sampler are the cell's own.
        """
        table = self.run.scores
        mine = table[
            (table["arm"] == arm) & (table["training_reward"] == training_reward) & (table["reward"] == reward)
        ]
        means = [
            mine[mine["variant"] == variant].groupby(["cell", "prompt_id"])["score"].mean().groupby("cell").mean()
            for variant in (OWN_SAMPLER, OWN_SAMPLER_BASE)
        ]
        gain = means[0] - means[1]
        found = [float(gain.get(cell.name, np.nan)) for cell in self.run.cells_of(arm, training_reward)]
        return np.asarray(found, dtype=np.float64)

    def metric(self, arm: str, training_reward: str, name: str, *, point: str = FINAL) -> Array:
        """(S,) mean over prompts of a metric (diversity, drift), by planned seed; NaN where missing."""
        table = self.run.metrics
        mine = table[(table["metric"] == name) & (table["point"] == point) & (table["variant"] == DEFAULT_VARIANT)]
        means = mine.groupby("cell")["value"].mean() if len(mine) else pd.Series(dtype=float)
        found = [float(means.get(cell.name, np.nan)) for cell in self.run.cells_of(arm, training_reward)]
        return np.asarray(found, dtype=np.float64)

    def base_metric(self, name: str) -> float:
        """The base model's mean over prompts of a metric; NaN where it has none."""
        table = self.run.metrics
        mine = table[(table["arm"] == BASE) & (table["metric"] == name) & (table["point"] == FINAL)]
        return float(mine["value"].mean()) if len(mine) else float("nan")

    def _rows(self, *key: str) -> pd.DataFrame:
        return self._differences.get(key, self._empty)

    @cached_property
    def _empty(self) -> pd.DataFrame:
        return self.run.scores.iloc[:0].assign(base=0.0, gain=0.0)


def _arrange(rows: pd.DataFrame, column: str) -> SeedScores:
    return seed_scores(
        rows[column].to_numpy(dtype=np.float64),
        seed=rows["seed"].to_numpy(dtype=np.int64),
        prompt=rows["prompt_id"].to_numpy(dtype=str),
        picture=rows["noise_id"].to_numpy(dtype=np.int64),
    )


def _states(cells: tuple[Cell, ...]) -> list[str]:
    """What was not finished has no value, like what crashed; the inventory tells them apart."""
    return [cell.state if cell.counts else "crashed" for cell in cells]


def _only_mean(rows: pd.DataFrame | None) -> float:
    """The seed mean of one cell's rows; NaN without any."""
    return float(_arrange(rows, "gain").means[0]) if rows is not None else float("nan")


def _base_mean(rows: pd.DataFrame) -> float:
    scores = _arrange(rows.assign(seed=0), "base")
    return float(scores.means[0])


def _mean(scores: SeedScores) -> float:
    return float(scores.means[0]) if len(scores.seeds) else float("nan")
