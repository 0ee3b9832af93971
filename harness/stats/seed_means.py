"""From scored pictures to one number per training seed.

A training seed is what a benchmark of algorithms repeats; pictures and prompts inside a seed share its luck, so
they are averaged away before any inference (Agarwal et al. 2021, Bouthillier et al. 2021). Treating them as
repetitions gives intervals several times too short.

Shapes: S training seeds, P prompts, K pictures (latents) per prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SeedScores:
    """The scores of one cell group (one method, training reward and evaluation reward), seed by seed.

    Attributes:
        values: (S, P, K) scores; NaN where a picture is missing or its reward does not apply.
        seeds: the S seed identities. ``prompts``, ``pictures``: those of the other two axes.
    """

    values: Array
    seeds: tuple[object, ...]
    prompts: tuple[object, ...]
    pictures: tuple[object, ...]

    @property
    def cells(self) -> Array:
        """(S, P): mean over the pictures of each prompt."""
        return average(self.values)

    @property
    def means(self) -> Array:
        """(S,): mean over prompts of the mean over pictures, so that every prompt weighs the same."""
        return average(self.cells)

    @property
    def prompts_scored(self) -> int:
        """How many prompts have at least one score; a reward may not apply to all of them."""
        return int(np.isfinite(self.values).any(axis=(0, 2)).sum())


@dataclass(frozen=True, eq=False)
class IntentionToTreat:
    """Seed values in which every planned run has its place.

    Attributes:
        values: (S,) NaN only for runs that crashed and must be repeated.
        planned, completed, diverged, crashed: counts of runs.
    """

    values: Array
    planned: int
    completed: int
    diverged: int
    crashed: int


def average(values: Array) -> Array:
    """Mean over the last axis of what is finite; NaN (not zero) where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=-1)
    total = np.where(finite, values, 0.0).sum(axis=-1)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0), dtype=np.float64)


def seed_scores(scores: ArrayLike, *, seed: ArrayLike, prompt: ArrayLike, picture: ArrayLike) -> SeedScores:
    """Arrange scored pictures by identity.

    Args:
        scores: (N,) one score per row; a value that is not finite counts as missing.
        seed: (N,) identity of the training seed.
        prompt: (N,) identity of the prompt.
        picture: (N,) identity of the latent.

    Rows with the same three identities are copies of one picture: they are averaged and weigh as one, so that
    storing a picture twice changes nothing.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    seeds, s = np.unique(np.asarray(seed), return_inverse=True)
    prompts, p = np.unique(np.asarray(prompt), return_inverse=True)
    pictures, k = np.unique(np.asarray(picture), return_inverse=True)
    shape = (len(seeds), len(prompts), len(pictures))
    finite = np.isfinite(values)
    place = ((s.ravel() * shape[1] + p.ravel()) * shape[2] + k.ravel())[finite]
    size = int(np.prod(shape))
    count = np.bincount(place, minlength=size)
    total = np.bincount(place, weights=values[finite], minlength=size)
    dense = np.divide(total, count, out=np.full(size, np.nan), where=count > 0).reshape(shape)
    return SeedScores(dense, tuple(seeds.tolist()), tuple(prompts.tolist()), tuple(pictures.tolist()))


def intention_to_treat(values: ArrayLike, status: Sequence[str], fallback: float) -> IntentionToTreat:
    """Keep every planned run: leaving out the runs that diverged would flatter unstable methods.

    Args:
        values: (S,) score of each planned run at its last finite checkpoint, NaN if it has none.
        status: S times ``completed``, ``diverged`` or ``crashed``.
        fallback: what a run that diverged without a finite checkpoint gets: the base model's score, or a gain of 0.
    """
    result = np.array(values, dtype=np.float64).ravel()
    if len(status) != len(result) or not set(status) <= {"completed", "diverged", "crashed"}:
        raise ValueError(f"one status of completed, diverged, crashed per run: {len(result)} runs, {list(status)}")
    kinds = np.asarray(status)
    result[(kinds == "diverged") & ~np.isfinite(result)] = fallback
    result[kinds == "crashed"] = np.nan
    counts = {kind: int((kinds == kind).sum()) for kind in ("completed", "diverged", "crashed")}
    return IntentionToTreat(result, len(result), counts["completed"], counts["diverged"], counts["crashed"])


def base_sd(base: SeedScores) -> float:
    """Pooled standard deviation of the base model's pictures within a prompt, the unit of standardised gains.

    sqrt(sum_p (K_p - 1) s_p^2 / sum_p (K_p - 1)) over the first (only) seed's (P, K) scores. The tuned model's own
    spread is never used: a collapsed model would look excellent. NaN where no prompt has two scored pictures or
    where the spread is zero, because nothing can be expressed in units of it.
    """
    scores = base.values[0]
    finite = np.isfinite(scores)
    freedom = int(np.maximum(finite.sum(axis=1) - 1, 0).sum())
    deviations = np.where(finite, scores - average(scores)[:, None], 0.0)
    if freedom == 0 or is_constant(deviations):
        return float("nan")
    return float(np.sqrt((deviations**2).sum() / freedom))


def present(values: ArrayLike) -> Array:
    """The finite values of a flat array."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[np.isfinite(flat)]


def strata(values: ArrayLike | Sequence[ArrayLike]) -> list[Array]:
    """One array of seed values per training reward: from one flat array (one stratum), rows, or several arrays."""
    items = list(values) if isinstance(values, (Sequence, np.ndarray)) else [values]
    if all(np.ndim(item) == 0 for item in items):
        return [np.asarray(items, dtype=np.float64)]
    return [np.asarray(item, dtype=np.float64).ravel() for item in items]


def is_constant(values: Array) -> bool:
    """Whether the values are equal up to rounding: a variance of 1e-34 is no estimate of anything."""
    return values.size == 0 or bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def content_rng(arrays: Sequence[Array]) -> np.random.Generator:
    """A random stream that depends on the numbers alone."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    return np.random.default_rng(int.from_bytes(digest.digest()[:16], "little"))
