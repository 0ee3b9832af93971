"""Over-optimisation while training: has a witness fallen from its best earlier point while the training reward rose?

A witness is anything that training does not see: the held-out measure of the training reward, another held-out reward,
a gold metric, the diversity within prompts. Values are paired: every point of training is evaluated on the same
prompts, and the unit is the prompt (pictures are averaged within it beforehand).

The statistic of a fall from point g to point t is ``u = sum_p d_p / sqrt(sum_p d_p^2)`` with ``d_p = value at g - value
at t``: a monotone function of Student's one-sided t, ``t = u sqrt((n - 1) / (n - u^2))``, but bounded by sqrt(n), so
that it exists for constant and for mostly tied differences. At each look (a point of the curve, or the end) the largest
u over earlier points and witnesses is compared with a critical value from flipping the signs of whole prompts: each
prompt's changes between all points, of all witnesses, get one sign. Under no change beyond noise (changes of a prompt
as likely up as down) this leaves their distribution as it is, with all correlation between points and witnesses, so
that the maximum is calibrated whatever that correlation (Westfall and Young 1993). The level is spent evenly over the
planned looks, and a flip that would have warned at an earlier look is spent: the chance of any false warning in a cell,
over all looks and all witnesses, is at most the level. Until the first warning this is exact for changes that are
symmetric; simulations for others are in docs/statistics.md.

What the prompts share is no noise here: an adapter that is worse on all prompts by chance is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.stats.seed_means import Array

LEVEL = 0.05
ENUMERATED_PROMPTS = 11  # 2048 sign patterns; for more prompts as many random ones, the same for everybody
FLIPS = 2**ENUMERATED_PROMPTS
ROUNDING = 1e-9


@dataclass(frozen=True)
class Fall:
    """A witness at one point of training below its value at an earlier one, beyond its noise.

    Attributes:
        witness: Its name.
        point, since: Indices of points; 0 is the base model. ``since`` is the witness's best earlier point, of those
            after which the training reward rose and from which the fall is beyond the noise.
        fall: Mean difference over prompts, in the witness's unit; positive.
        standard_error: Of that mean over prompts; 0 where all prompts fell by the same.
        rise: Mean change of the training reward over prompts between the same points; positive.
        statistic, critical: u, and what it exceeded.
        prompts: With a value of the witness at both points.
    """

    witness: str
    point: int
    since: int
    fall: float
    standard_error: float
    rise: float
    statistic: float
    critical: float
    prompts: int


@dataclass(frozen=True)
class Watch:
    """What was seen in one cell.

    Attributes:
        falls: By point, then by witness in the order given. A witness that stays down is in it at every point.
        critical: At each look; infinite where no data could have warned (too few prompts).
        witnesses: Names of those that had a value at two points at least.
    """

    falls: tuple[Fall, ...]
    critical: tuple[float, ...]
    witnesses: tuple[str, ...]

    @property
    def first(self) -> dict[str, Fall]:
        """The first fall of each witness that fell."""
        return {fall.witness: fall for fall in reversed(self.falls)}


def watch(
    training: ArrayLike, witnesses: Mapping[str, ArrayLike], looks: int | None = None, *, level: float = LEVEL
) -> Watch:
    """Look for falls at all points so far.

    Args:
        training: (G + 1, P) training reward at the base model and at G points, in the order of training, for P
            prompts. A prompt is the same column everywhere; NaN is missing.
        witnesses: (G + 1, P) each.
        looks: How many points are planned in all, at least G (default). A look's result never depends on later points.
        level: Chance of any warning where nothing falls.

    Raises:
        ValueError: Shapes differ, or there are more points than looks.
    """
    reward = np.atleast_2d(np.asarray(training, dtype=np.float64))
    values = {name: np.atleast_2d(np.asarray(table, dtype=np.float64)) for name, table in witnesses.items()}
    if any(table.shape != reward.shape for table in values.values()):
        raise ValueError(f"training reward and witnesses need one shape: {reward.shape} and others")
    points, prompts = len(reward) - 1, reward.shape[1]
    planned = points if looks is None else looks
    if points > planned:
        raise ValueError(f"{points} points where {planned} are planned")
    flips = _flips(prompts)
    spent = np.zeros(len(flips), dtype=bool)
    falls: list[Fall] = []
    thresholds: list[float] = []
    for now in range(1, points + 1):
        statistics, largest = _flipped(values, now, flips)
        critical = _critical(largest, spent, level * now / planned)
        thresholds.append(critical)
        spent |= largest > critical
        for k, (name, table) in enumerate(values.items()):
            found = _fall(name, table, reward, now, statistics[k], critical)
            falls += [found] if found else []
    seen = tuple(name for name, table in values.items() if (np.isfinite(table).any(axis=1)).sum() > 1)
    return Watch(tuple(falls), tuple(thresholds), seen)


def sign_flips(prompts: int) -> Array:
    """(F, P) of -1 and 1, the identity first: all 2^P for few prompts, else random ones, the same for equal P."""
    if prompts <= ENUMERATED_PROMPTS:
        bits = (np.arange(2**prompts)[:, None] >> np.arange(prompts)[None, :]) & 1
        return np.asarray(1.0 - 2.0 * bits, dtype=np.float64)
    random = np.random.default_rng([prompts, FLIPS]).integers(0, 2, size=(FLIPS - 1, prompts))
    return np.concatenate([np.ones((1, prompts)), 1.0 - 2.0 * random])


@lru_cache(maxsize=4)
def _flips(prompts: int) -> Array:
    """Made once for all cells that are watched on the same number of prompts."""
    return sign_flips(prompts)


def _flipped(values: Mapping[str, Array], now: int, flips: Array) -> tuple[Array, Array]:
    """Statistics (W, now) of the falls from each earlier point, and the largest of each flip (F,)."""
    observed = np.zeros((len(values), now))
    largest = np.full(len(flips), -np.inf)
    for k, table in enumerate(values.values()):
        scaled = _scaled(table[:now] - table[now])
        observed[k] = scaled.sum(axis=1)
        for column in (flips @ scaled.T).T:  # few of them: much faster than the largest of each short row
            largest = np.maximum(largest, column)
    return observed, largest


def _scaled(differences: Array) -> Array:
    """Rows of length one: sums over flipped columns are the statistic; a missing or zero difference counts nothing."""
    known = np.where(np.isfinite(differences), differences, 0.0)
    length = np.linalg.norm(known, axis=1, keepdims=True)
    return np.asarray(known / np.where(length > 0, length, 1.0), dtype=np.float64)


def _critical(largest: Array, spent: NDArray[np.bool_], share: float) -> float:
    """What at most so many flips exceed that, with those spent before, no more than `share` of all are spent."""
    allowed = int(np.floor(share * len(largest) + ROUNDING)) - int(spent.sum())
    left = np.sort(largest[~spent])[::-1]
    if allowed < 1:
        return float("inf")
    return float(left[allowed] if allowed < len(left) else -np.inf) + ROUNDING


def _fall(name: str, table: Array, reward: Array, now: int, statistics: Array, critical: float) -> Fall | None:
    rises = [_mean(reward[now] - reward[since]) for since in range(now)]
    found = [since for since in range(now) if statistics[since] > critical and rises[since] > 0]
    if not found:
        return None
    differences = table[:now] - table[now]
    since = max(found, key=lambda k: (_mean(differences[k]), -k))
    known = differences[since][np.isfinite(differences[since])]
    n = len(known)
    error = float(known.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Fall(name, now, since, float(known.mean()), error, rises[since], float(statistics[since]), critical, n)


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
