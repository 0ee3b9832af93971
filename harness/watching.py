"""From a cell's records to the over-optimisation watch: the same for a running cell and for the report (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.stats.seed_means import Array
from harness.stats.watch import Fall, Watch, watch

START, END, FINAL = "0", "end", "final"
DIVERSITY = "pairwise_distance"
HELD_OUT_SUFFIX = "-heldout"


@dataclass(frozen=True)
class Warned:
    """A fall with its names.

    Attributes:
        training_reward: What is trained on.
        point, since: Of the curve, in the budget's unit; `0` is the base model and `end` the end of training.
        base: Mean of the witness at the base model.
    """

    training_reward: str
    point: str
    since: str
    base: float
    found: Fall

    @property
    def sentence(self) -> str:
        """In words, with numbers."""
        since = "the base model" if self.since == START else f"point {self.since}"
        where = "the end" if self.point == END else f"point {self.point}"
        return (
            f"over-optimisation at {where}: {self.found.witness} fell by {self.found.fall:.3g} since {since} "
            f"while {self.training_reward} rose by {self.found.rise:.3g}"
        )

    @property
    def numbers(self) -> dict[str, Any]:
        """For the log."""
        return {
            "point": self.point,
            "witness": self.found.witness,
            "since": self.since,
            "fall": self.found.fall,
            "standard_error": self.found.standard_error,
            "training_reward": self.training_reward,
            "rise": self.found.rise,
            "statistic": self.found.statistic,
            "critical": self.found.critical,
            "prompts": self.found.prompts,
        }


@dataclass(frozen=True)
class CellWatch:
    """The watch of one cell.

    Attributes:
        points: Those compared, the base model first.
        warnings: By point and witness; one that stays down is there at every point.
        result: Of the statistics.
        unrecorded: Witnesses that were not recorded at every point. A metric that applies to no prompt is none, and
            nor is diversity where each prompt has one picture along training.
    """

    points: tuple[str, ...]
    warnings: tuple[Warned, ...]
    result: Watch
    unrecorded: tuple[str, ...]

    @property
    def first_warnings(self) -> tuple[Warned, ...]:
        """The first of each witness, by point."""
        seen: dict[str, Warned] = {}
        for warned in self.warnings:
            seen.setdefault(warned.found.witness, warned)
        return tuple(seen.values())


def sum_of_terms(terms: Iterable[tuple[float, str]]) -> dict[str, float]:
    """The weight of each component of a training reward, from its (weight, name) terms."""
    result: dict[str, float] = {}
    for weight, name in terms:
        result[name] = result.get(name, 0.0) + weight
    return result


def witnesses_of(terms: Mapping[str, float], roles: Mapping[str, str]) -> list[str]:
    """Names of what watches a training reward: its held-out measures, other held-out rewards, gold metrics, diversity.

    A reward that is trained downwards (a negative weight) is no witness, and nor is its held-out measure.
    """
    own = [name + HELD_OUT_SUFFIX for name, weight in terms.items() if weight > 0]
    downwards = {name + HELD_OUT_SUFFIX for name, weight in terms.items() if weight < 0}
    judges = [name for role in ("held-out", "gold") for name in roles if roles[name] == role]
    names = dict.fromkeys([*(name for name in own if name in roles), *judges])
    return [name for name in names if name not in terms and name not in downwards] + [DIVERSITY]


def watch_cell(
    scores: pd.DataFrame,
    metrics: pd.DataFrame,
    base_scores: pd.DataFrame,
    base_metrics: pd.DataFrame,
    *,
    training_reward: str,
    terms: Mapping[str, float],
    roles: Mapping[str, str],
    latents: int,
    looks: int,
) -> CellWatch:
    """Compare all points of a cell's curve so far, on the pictures that they share with the base model.

    Args:
        scores: Of the cell (default variant) on the split that results are about: points of the curve, and the end as
            `end` or `final`.
        metrics: Of the cell; points as in `scores`, of which `final` is left out (it is on other pictures).
        base_scores: Of the base model on the same prompts and latents, at least.
        base_metrics: Of the base model, at point `0`.
        training_reward: Its name.
        terms: Its components with their weights.
        roles: Of all evaluation rewards.
        latents: Pictures per prompt at curve points; others are left out.
        looks: Points planned, the end included.
    """
    points = _ordered({START} | {_name(p) for p in scores["point"].unique()})
    rewards = [name for name in dict.fromkeys([*terms, *witnesses_of(terms, roles)]) if name != DIVERSITY]
    before = {str(p) for p in base_scores["prompt_id"].unique()} | {str(p) for p in base_metrics["prompt_id"].unique()}
    prompts = sorted(before | {str(p) for p in scores["prompt_id"].unique()})
    table = np.full((len(rewards), len(points), len(prompts), latents), np.nan)
    for rows, start in ((base_scores, START), (scores, "")):
        _fill(table, rows, start, rewards, points, prompts)
    arrays = dict(zip(rewards, _by_prompt(table), strict=True))
    distance = np.full((1, len(points), len(prompts), 1), np.nan)
    for rows, start in ((base_metrics, START), (metrics[metrics["point"] != FINAL], "")):
        mine = rows[rows["metric"] == DIVERSITY].rename(columns={"metric": "reward", "value": "score"})
        _fill(distance, mine.assign(noise_id=0), start, [DIVERSITY], points, prompts)
    arrays[DIVERSITY] = distance[0, :, :, 0]
    reward = np.zeros((len(points), len(prompts)))
    for name, weight in terms.items():
        reward = reward + weight * arrays[name]
    wanted = [name for name in witnesses_of(terms, roles) if np.isfinite(arrays[name]).any() or name == DIVERSITY]
    if latents < 2:
        wanted.remove(DIVERSITY)
    result = watch(reward, {name: arrays[name] for name in wanted}, max(looks, len(points) - 1))
    warnings = tuple(
        Warned(training_reward, points[f.point], points[f.since], _mean(arrays[f.witness][0]), f) for f in result.falls
    )
    along = [name for name in wanted if not np.isfinite(arrays[name]).any(axis=1).all()]
    return CellWatch(tuple(points), warnings, result, tuple(along))


def _fill(
    table: Array, rows: pd.DataFrame, start: str, rewards: list[str], points: list[str], prompts: list[str]
) -> None:
    """Put scores in their places (reward, point, prompt, latent); at the point `start` where one is given."""
    places = [_places(rows["reward"], rewards), _places(rows["point"], points), _places(rows["prompt_id"], prompts)]
    if start:
        places[1] = np.full(len(rows), points.index(start))
    noise = rows["noise_id"].to_numpy(dtype=np.int64)
    kept = (np.min(places, axis=0) >= 0) & (noise < table.shape[3]) if len(rows) else np.zeros(0, dtype=bool)
    where = tuple(place[kept] for place in places)
    table[(*where, noise[kept])] = rows["score"].to_numpy(dtype=np.float64)[kept]


def _places(column: pd.Series, names: list[str]) -> NDArray[np.intp]:
    """Index of each value among the names; -1 for another."""
    codes, values = pd.factorize(column)
    index = {name: k for k, name in enumerate(names)}
    known = np.array([index.get(_name(value), -1) for value in values], dtype=np.intp)
    return known[codes] if len(known) else np.zeros(0, dtype=np.intp)


def _name(point: object) -> str:
    """The end of training is the last point of the curve."""
    return END if str(point) == FINAL else str(point)


def _by_prompt(table: Array) -> Array:
    """Mean over latents; a picture that lacks a point is left out everywhere."""
    complete = np.isfinite(table).all(axis=1, keepdims=True)
    n = complete.sum(axis=3)
    total = np.where(complete, table, 0.0).sum(axis=3)
    return np.asarray(np.where(n > 0, total / np.maximum(n, 1), np.nan), dtype=np.float64)


def _ordered(points: set[str]) -> list[str]:
    return sorted(points, key=lambda p: float("inf") if p == END else float(p))


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
