"""Scores as benchmarks give them, made up with a known truth.

Y = a_seed + b_prompt + c_seed,prompt + e_picture. Every effect has mean zero, so that the truth is zero for a sample of
prompts and the mean of the prompts' effects for a suite that stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.stats.seed_means import Array

PROMPTS, PICTURES = 50, 4
Shape = Literal["normal", "heavy tails", "skewed", "collapses", "deep collapses"]
SHAPES: tuple[Shape, ...] = ("normal", "heavy tails", "skewed", "collapses", "deep collapses")


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the effects of seeds, prompts, both together, and pictures."""

    seed: float = 1.0
    prompt: float = 1.0
    both: float = 0.5
    picture: float = 1.0


def draw(rng: np.random.Generator, size: tuple[int, ...], shape: Shape = "normal") -> Array:
    """Values with mean zero; SD one, to which collapses add: one value in ten falls by three SDs, or by ten."""
    if shape == "heavy tails":
        return rng.standard_t(3, size) / np.sqrt(3)
    if shape == "skewed":
        return rng.exponential(size=size) - 1
    values = rng.normal(size=size)
    depth = {"normal": 0.0, "collapses": 3.0, "deep collapses": 10.0}[shape]
    return values - depth * ((rng.random(size) < 0.1) - 0.1) if depth else values


def cells(
    rng: np.random.Generator,
    n: int,
    seeds: int,
    spread: Spread,
    *,
    unseen: bool,
    shape: Shape = "normal",
    prompts: int = PROMPTS,
) -> tuple[Array, float]:
    """(n, S, P) means over pictures, and the truth. ``unseen``: every repetition has prompts of its own."""
    effects = spread.prompt * rng.normal(size=(n if unseen else 1, 1, prompts))
    values = (
        spread.seed * draw(rng, (n, seeds, 1), shape)
        + effects
        + spread.both * rng.normal(size=(n, seeds, prompts))
        + spread.picture / np.sqrt(PICTURES) * rng.normal(size=(n, seeds, prompts))
    )
    return values, 0.0 if unseen else float(effects.mean())


def with_pictures(rng: np.random.Generator, means: Array, spread: Spread) -> Array:
    """(n, S, P, K) scores of pictures whose means over K are given."""
    noise = spread.picture * rng.normal(size=(*means.shape, PICTURES))
    return means[..., None] + noise - noise.mean(axis=-1, keepdims=True)
