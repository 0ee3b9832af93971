"""From a cell's records to the over-optimisation watch: the same for a running cell and for the report (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True, eq=False)
class Rows:
    """Scored pictures as arrays: a report watches many cells, and each selection from a data frame takes its time.

    Attributes:
        names: The values of reward, point and prompt. ``codes``: of each, (N,) indices of them; -1 is missing.
        noise, score: (N,).
    """

    names: tuple[list[str], ...]
    codes: tuple[NDArray[np.integer], ...]
    noise: NDArray[np.integer]
    score: Array

    @classmethod
    def of_scores(cls, table: pd.DataFrame) -> Self:
        """Rows of scores.parquet."""
        noise = table["noise_id"].to_numpy(dtype=np.int64)
        return cls._of(table, "reward", noise, table["score"])

    @classmethod
    def of_metrics(cls, table: pd.DataFrame) -> Self:
        """Rows of metrics.parquet: a metric is one number for a prompt."""
        return cls._of(table, "metric", np.zeros(len(table), dtype=np.int64), table["value"])

    @classmethod
    def _of(cls, table: pd.DataFrame, reward: str, noise: NDArray[np.integer], score: pd.Series) -> Self:
        found = [_coded(table[column]) for column in (reward, "point", "prompt_id")]
        names, codes = tuple(names for names, _ in found), tuple(codes for _, codes in found)
        return cls(names, codes, noise, score.to_numpy(dtype=np.float64))

    def part(self, chosen: NDArray[Any] | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.names, tuple(codes[chosen] for codes in self.codes), self.noise[chosen], self.score[chosen])

    @property
    def points(self) -> set[str]:
        """Those that occur."""
        return self._seen(1)

    @property
    def prompts(self) -> set[str]:
        """Those that occur."""
        return self._seen(2)

    def _seen(self, column: int) -> set[str]:
        return {self.names[column][code] for code in np.unique(self.codes[column]).tolist() if code >= 0}

    @property
    def along(self) -> Rows:
        """Without the final evaluation, which is on other pictures."""
        return self.part(self.codes[1] != self.names[1].index(FINAL)) if FINAL in self.names[1] else self


def _coded(column: pd.Series) -> tuple[list[str], NDArray[np.integer]]:
    """The values of a column, and for each row which it has."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return [str(name) for name in column.cat.categories], column.cat.codes.to_numpy()
    codes, values = pd.factorize(column)
    return [str(value) for value in values], codes


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
    return watch_rows(
        Rows.of_scores(scores),
        Rows.of_metrics(metrics),
        Rows.of_scores(base_scores),
        Rows.of_metrics(base_metrics),
        training_reward=training_reward,
        terms=terms,
        roles=roles,
        latents=latents,
        looks=looks,
    )


def watch_rows(
    scores: Rows,
    metrics: Rows,
    base_scores: Rows,
    base_metrics: Rows,
    *,
    training_reward: str,
    terms: Mapping[str, float],
    roles: Mapping[str, str],
    latents: int,
    looks: int,
) -> CellWatch:
    """`watch_cell` of rows that are arrays already."""
    points = _ordered({START} | {_name(p) for p in scores.points})
    rewards = [name for name in dict.fromkeys([*terms, *witnesses_of(terms, roles)]) if name != DIVERSITY]
    prompts = sorted(base_scores.prompts | base_metrics.prompts | scores.prompts)
    table = np.full((len(rewards), len(points), len(prompts), latents), np.nan)
    for rows, start in ((base_scores, START), (scores, "")):
        _fill(table, rows, start, rewards, points, prompts)
    arrays = dict(zip(rewards, _by_prompt(table), strict=True))
    # A reward that was added to a finished run scored its end alone.
    scored = {name: np.isfinite(one).any(axis=(1, 2)) for name, one in zip(rewards, table, strict=True)}
    distance = np.full((1, len(points), len(prompts), 1), np.nan)
    for rows, start in ((base_metrics, START), (metrics.along, "")):
        _fill(distance, rows, start, [DIVERSITY], points, prompts)
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
    scored |= {name: np.isfinite(arrays[name]).any(axis=1) for name in wanted}
    some = [name for name in witnesses_of(terms, roles) if name in wanted or (name in rewards and scored[name].any())]
    return CellWatch(tuple(points), warnings, result, tuple(name for name in some if not scored[name].all()))


def _fill(table: Array, rows: Rows, start: str, rewards: list[str], points: list[str], prompts: list[str]) -> None:
    """Put scores in their places (reward, point, prompt, latent); at the point `start` where one is given."""
    wanted = (rewards, points, prompts)
    places = [_places(*column) for column in zip(rows.names, rows.codes, wanted, strict=True)]
    if start:
        places[1] = np.full(len(rows.score), points.index(start))
    kept = (np.minimum.reduce(places) >= 0) & (rows.noise < table.shape[3])
    where = tuple(place[kept] for place in places)
    table[(*where, rows.noise[kept])] = rows.score[kept]


def _places(values: list[str], codes: NDArray[np.integer], names: list[str]) -> NDArray[np.intp]:
    """Index of each value among the names; -1 for another."""
    index = {name: k for k, name in enumerate(names)}
    known = np.array([*(index.get(_name(value), -1) for value in values), -1], dtype=np.intp)
    places: NDArray[np.intp] = known[codes]
    return places


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
