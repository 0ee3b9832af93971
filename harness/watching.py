"""From a cell's records to the over-optimisation watch: the same for a running cell and for the report (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

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
        unrecorded: Witnesses that the run has and that were not recorded along this cell's training.
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
        latents: Pictures per prompt at curve points.
        looks: Points planned, the end included.
    """
    mine = scores.assign(point=scores["point"].replace({FINAL: END}))
    every = pd.concat([base_scores.assign(point=START), mine])
    every = every[every["noise_id"] < latents]
    points = _ordered({START, *mine["point"]})
    by_reward = {str(name): rows for name, rows in every.groupby("reward", sort=True)}
    tables = {name: _by_prompt(by_reward[name], points) for name in by_reward}
    measured = pd.concat([base_metrics.assign(point=START), metrics[metrics["point"] != FINAL]])
    distances = measured[measured["metric"] == DIVERSITY]
    tables[DIVERSITY] = distances.pivot_table(index="point", columns="prompt_id", values="value").reindex(points)
    wanted = witnesses_of(terms, roles)
    prompts = sorted({str(p) for p in every["prompt_id"]} | {str(p) for p in distances["prompt_id"]})
    arrays = {name: _array(tables[name], points, prompts) for name in tables}
    empty = np.full((len(points), len(prompts)), np.nan)
    reward = sum((weight * arrays.get(name, empty) for name, weight in terms.items()), np.zeros_like(empty))
    result = watch(reward, {name: arrays.get(name, empty) for name in wanted}, max(looks, len(points) - 1))
    warnings = tuple(
        Warned(training_reward, points[f.point], points[f.since], _mean(arrays[f.witness][0]), f) for f in result.falls
    )
    along = [name for name in wanted if not np.isfinite(arrays.get(name, empty)).any(axis=1).all()]
    return CellWatch(tuple(points), warnings, result, tuple(along))


def _by_prompt(rows: pd.DataFrame, points: list[str]) -> pd.DataFrame:
    """Mean over latents, (points, prompts); a picture that lacks a point is left out everywhere."""
    pairs = rows.pivot_table(index=["prompt_id", "noise_id"], columns="point", values="score", dropna=False)
    complete = pairs.reindex(columns=points).dropna()
    return complete.groupby(level="prompt_id").mean().T


def _array(table: pd.DataFrame, points: list[str], prompts: list[str]) -> Array:
    return table.reindex(index=points, columns=prompts).to_numpy(dtype=np.float64)


def _ordered(points: set[Any]) -> list[str]:
    return sorted((str(p) for p in points), key=lambda p: float("inf") if p == END else float(p))


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
