"""Made-up trainings for the over-optimisation watch: in some nothing falls, in others one witness does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.stats.seed_means import Array
from harness.stats.watch import watch
from tests.calibration.rates import Rate, share
from tests.calibration.structures import draw

WITNESSES = 4
PEAK = 0.5  # of the planned points: where a witness that falls is best
Make = Callable[[np.random.Generator, int, int], Array]


@dataclass(frozen=True)
class Story:
    """How the witnesses (W, G + 1, P) of one training come about, in units of their noise."""

    name: str
    make: Make


def _noise(rng: np.random.Generator, size: tuple[int, ...]) -> Array:
    """Normal, correlated .5 between the witnesses of a picture."""
    return (rng.normal(size=size) + rng.normal(size=(1, *size[1:]))) / np.sqrt(2)


def _no_change(rng: np.random.Generator, points: int, prompts: int) -> Array:
    return 2 * rng.normal(size=(WITNESSES, 1, prompts)) + _noise(rng, (WITNESSES, points + 1, prompts))


def _wandering(rng: np.random.Generator, points: int, prompts: int) -> Array:
    return _noise(rng, (WITNESSES, points + 1, prompts)).cumsum(axis=1)


def _plateau(rng: np.random.Generator, points: int, prompts: int) -> Array:
    rise = np.minimum(np.arange(points + 1) / (PEAK * points), 1.0)
    return 2 * rise[None, :, None] + _no_change(rng, points, prompts)


def _heavy(rng: np.random.Generator, points: int, prompts: int) -> Array:
    return draw(rng, (WITNESSES, points + 1, prompts), "heavy tails").cumsum(axis=1)


def _few_rise(rng: np.random.Generator, points: int, prompts: int) -> Array:
    return draw(rng, (WITNESSES, points + 1, prompts), "skewed").cumsum(axis=1)


def _few_fall(rng: np.random.Generator, points: int, prompts: int) -> Array:
    return -_few_rise(rng, points, prompts)


def _accuracy(rng: np.random.Generator, points: int, prompts: int) -> Array:
    """Right or wrong, each prompt with a difficulty of its own; a picture in three changes from point to point."""
    chance = rng.beta(4, 1, size=(WITNESSES, 1, prompts))
    fresh = (rng.random((WITNESSES, points + 1, prompts)) < chance).astype(np.float64)
    for point in range(1, points + 1):
        same = rng.random((WITNESSES, prompts)) < 2 / 3
        fresh[:, point] = np.where(same, fresh[:, point - 1], fresh[:, point])
    return fresh


def _missing(rng: np.random.Generator, points: int, prompts: int) -> Array:
    """Two gold metrics that apply to half of the prompts."""
    values = _no_change(rng, points, prompts)
    values[2:, :, ::2] = np.nan
    return values


NULLS = (
    Story("no change", _no_change),
    Story("each prompt wanders", _wandering),
    Story("rises, then a plateau", _plateau),
    Story("heavy tails", _heavy),
    Story("right or wrong, many ties", _accuracy),
    Story("half the prompts missing", _missing),
)
MOST_FALL = Story("most fall a little, few rise much", _few_rise)
FEW_FALL = Story("most rise a little, few fall much", _few_fall)


def rising(points: int, prompts: int) -> Array:
    """A training reward that gains at every point."""
    return np.arange(points + 1.0)[:, None] + np.zeros(prompts)


def _first(values: Array, points: int, prompts: int) -> int | None:
    seen = watch(rising(points, prompts), {str(k): table for k, table in enumerate(values)}, points)
    return seen.falls[0].point if seen.falls else None


def false_alarms(rng: np.random.Generator, story: Story, n: int, *, points: int, prompts: int) -> Rate:
    """How many of n trainings are warned of, at whatever point, by whatever witness."""
    return share(_first(story.make(rng, points, prompts), points, prompts) is not None for _ in range(n))


def first_alarms(rng: np.random.Generator, n: int, fall: float, *, points: int, prompts: int) -> list[int | None]:
    """The point of the first warning in n trainings; None where there is none.

    The first witness rises by one until its peak, and from there to the end falls by ``fall`` SDs of a prompt's change
    between two points; the others do not change.
    """
    place = np.arange(points + 1) / points
    path = np.where(place <= PEAK, place / PEAK, 1 - fall * np.sqrt(2) * (place - PEAK) / (1 - PEAK))
    found = []
    for _ in range(n):
        values = _no_change(rng, points, prompts)
        values[0] += path[:, None]
        found.append(_first(values, points, prompts))
    return found
