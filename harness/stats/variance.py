"""Where the variance of a mean comes from: seeds, prompts, latents; and what another design would make of it.

Every seed's adapter is scored on the same prompts and, per prompt, on the same K initial latents. A latent belongs to
its prompt (the bank is keyed by both), so latents are nested in prompts, and both are crossed with seeds:

    Y_spk = mu + a_s + b_p + l_pk + c_sp + e_spk

with a (seed), b (prompt), l (latent of a prompt), c (how a seed's luck depends on the prompt) and e (the same for the
latent; generation has no further noise). A mean over all three axes then varies by

    this suite:      sa^2 / S + sc^2 / (S P) + se^2 / (S P K)                 prompts and latents stay as they are
    unseen prompts:  ... + sb^2 / P + sl^2 / (P K)                           prompts are drawn, with their latents

Components are estimated from mean squares (method of moments), each unbiased on its own and possibly negative where
it is small. Predictions take negative ones as 0 and let their neighbours bear it, so that the design which they come
from is predicted as it was observed. In gains over the base model, whose score of each
(prompt, latent) is a constant, b and l are those of the gain, and a, c, e are as in the scores. In a difference of
arms, b and l are those of the difference: what both arms share cancels.

Shapes: S seeds, P prompts, K latents per prompt. With K = 1, l and e cannot be told from b and c, which then hold
both; nothing can be predicted for another K. With P = 1 or S = 1 there is no decomposition: NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.stats.intervals import NAN, Interval, Part, join, t_interval
from harness.stats.power import detectable_difference, pilot_inflation, t_power
from harness.stats.seed_means import Array, SeedScores

POWER = 0.8


@dataclass(frozen=True)
class Components:
    """Variance components of one arm's scores, unbiased and hence possibly negative.

    Attributes:
        seed, prompt, latent, seed_prompt, residual: sa^2, sb^2, sl^2, sc^2 and se^2 above.
        seeds, prompts, latents: S, P and K that they were estimated from.
        note: what was left out.
    """

    seed: float
    prompt: float
    latent: float
    seed_prompt: float
    residual: float
    seeds: int
    prompts: int
    latents: int
    note: str = ""

    def seed_variance(self, prompts: int, latents: int) -> float:
        """Variance of one seed's mean over this many prompts and latents, for prompts that stay the same."""
        return self._kept[0] + self.interaction(latents) / prompts

    def interaction(self, latents: int) -> float:
        """Variance of a seed's mean for one prompt beyond what the seed has in all: sc^2 + se^2 / K."""
        _, both, rest = self._kept
        return _per_prompt(both, rest, self.latents, latents)

    @property
    def _kept(self) -> tuple[float, float, float]:
        """Components of seed, of seed and prompt, and the rest, none negative; seed means vary as observed."""
        inner = self.seed_prompt + self.residual / self.latents
        both, rest = _not_negative(self.seed_prompt, self.residual, self.latents)
        if not self.seed < 0:
            return self.seed, both, rest
        factor = max(1 + self.seed * self.prompts / inner, 0.0) if inner > 0 else 0.0
        return 0.0, both * factor, rest * factor


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of arms' means: one gain, a difference, or one of these averaged over training rewards.

    Attributes:
        sides: components of each term; runs of different terms are independent.
        weights: +1 and -1 for a difference, these over R for the mean over R rewards.
        prompt, latent: sb^2 and sl^2 of the sum itself, unbiased.
    """

    sides: tuple[Components, ...]
    weights: tuple[float, ...]
    prompt: float
    latent: float

    @property
    def latents(self) -> int:
        """Latents per prompt that it was estimated from."""
        return self.sides[0].latents

    @property
    def inflation(self) -> float:
        """Factor on its SD over seeds that reaches the true one in 80 of 100 pilots of this size; NaN without one."""
        first = self.sides[0]
        seeds = min(side.seeds for side in self.sides)
        return pilot_inflation(self.expected(seeds, first.prompts, first.latents, unseen=False).df + 1)

    def inflated(self, factor: float) -> Contrast:
        """The same with SDs over seeds this many times as large; what belongs to prompts alone stays."""
        square = factor**2
        sides = tuple(
            replace(c, seed=c.seed * square, seed_prompt=c.seed_prompt * square, residual=c.residual * square)
            for c in self.sides
        )
        return replace(self, sides=sides)

    def parts(self, seeds: int, prompts: int, latents: int, *, unseen: bool) -> list[Part]:
        """Expected parts of the variance of its estimate in a design, as those of the intervals in `intervals`."""
        squares = [weight**2 for weight in self.weights]
        parts = [
            Part(square * side.seed_variance(prompts, latents) / seeds, seeds - 1)
            for square, side in zip(squares, self.sides, strict=True)
        ]
        own = self.prompt_variance(latents) / prompts
        if unseen and own > 0:
            noise = [
                square * side.interaction(latents) / (seeds * prompts)
                for square, side in zip(squares, self.sides, strict=True)
            ]
            parts.append(Part(own + sum(noise), prompts - 1))
            parts += [Part(-each, (seeds - 1) * (prompts - 1)) for each in noise]
        return parts

    def prompt_variance(self, latents: int) -> float:
        """Variance of the sum for one prompt drawn at random, its latents included: sb^2 + sl^2 / K."""
        return _per_prompt(*_not_negative(self.prompt, self.latent, self.latents), self.latents, latents)

    def expected(self, seeds: int, prompts: int, latents: int, *, unseen: bool) -> Interval:
        """The interval around 0 that a design is expected to give; undefined below two seeds."""
        parts = self.parts(seeds, prompts, latents, unseen=unseen)
        if seeds < 2 or (unseen and prompts < 2) or not all(math.isfinite(part.variance) for part in parts):
            return Interval(0.0, NAN, NAN, n=seeds, note="undefined for this design")
        return t_interval(0.0, parts, n=seeds)

    def detectable(self, seeds: int, prompts: int, latents: int, *, unseen: bool, alpha: float = 0.05) -> float:
        """Smallest difference that a design finds with 80 % power; NaN where that is undefined."""
        return detectable_difference(self.expected(seeds, prompts, latents, unseen=unseen), alpha=alpha, power=POWER)

    def seeds_needed(
        self, difference: float, prompts: int, latents: int, *, unseen: bool, alpha: float = 0.05, limit: int = 10_000
    ) -> int | None:
        """Fewest seeds per arm that find a difference with 80 % power; None above the limit, or if it is undefined."""

        def enough(seeds: int) -> bool:
            found = self.expected(seeds, prompts, latents, unseen=unseen)
            return t_power(difference / found.standard_error, found.df, alpha) >= POWER

        low, high = 1, 2
        while not enough(high):
            low, high = high, high * 2
            if low >= limit:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


def components(scores: SeedScores) -> Components:
    """Variance components of one arm.

    Args:
        scores: (S, P, K); seeds without any score are left out, then prompts with a picture missing in any seed.
    """
    (table,), note = complete([scores])
    return _components(table, note)


def contrast(terms: Sequence[SeedScores], weights: Sequence[float]) -> Contrast:
    """Components of a weighted sum of arms.

    Args:
        terms: scores of the arms, on the same prompts and latents; matched by identity, what one lacks is left out.
        weights: of each.
    """
    tables, note = complete(terms)
    sides = tuple(_components(table, note) for table in tables)
    p, k = tables[0].shape[1:]
    nothing = Contrast(sides, tuple(weights), NAN, NAN)
    if p < 2 or any(len(table) < 2 for table in tables):
        return nothing
    means = sum(weight * table.mean(axis=0) for weight, table in zip(weights, tables, strict=True))
    assert isinstance(means, np.ndarray)
    squares = [weight**2 / side.seeds for weight, side in zip(weights, sides, strict=True)]

    def noise(latents: int) -> float:
        """What the seeds' luck adds to the spread of these means over prompts."""
        each = (square * (c.seed_prompt + c.residual / latents) for square, c in zip(squares, sides, strict=True))
        return float(sum(each))

    by_prompt = float(means.mean(axis=1).var(ddof=1))
    if k == 1:
        return replace(nothing, prompt=by_prompt - noise(1), latent=0.0)
    within = float(means.var(axis=1, ddof=1).mean())
    residual = float(sum(square * c.residual for square, c in zip(squares, sides, strict=True)))
    latent = within - residual
    return replace(nothing, prompt=by_prompt - latent / k - noise(k), latent=latent)


def complete(terms: Sequence[SeedScores]) -> tuple[list[Array], str]:
    """(S_i, P, K) tables without gaps on the prompts and latents that all terms have, and a note on what was left out.

    The mean squares need balanced tables. Latents that are missing throughout a term are left out first, then seeds
    without any score, then prompts with a picture missing in any seed.
    """
    prompts = [p for p in terms[0].prompts if all(p in term.prompts for term in terms)]
    pictures = [k for k in terms[0].pictures if all(k in term.pictures for term in terms)]
    tables = []
    for term in terms:
        rows = [term.prompts.index(p) for p in prompts]
        columns = [term.pictures.index(k) for k in pictures]
        tables.append(term.values[:, rows][:, :, columns])
    kept = [table[np.isfinite(table).any(axis=(1, 2))] for table in tables]
    whole = np.logical_and.reduce([np.isfinite(table).all(axis=(0, 2)) for table in kept])
    every = len({p for term in terms for p in term.prompts})
    lost, seeds = every - int(whole.sum()), sum(map(len, tables)) - sum(map(len, kept))
    note = join(
        f"{seeds} seeds without scores left out" if seeds else "",
        f"{lost} incomplete prompts left out" if lost else "",
    )
    return [table[:, whole] for table in kept], note


def _components(table: Array, note: str) -> Components:
    """Expected mean squares of the balanced design, solved for the components."""
    s, p, k = table.shape
    if s < 2 or p < 2 or k < 1:
        return Components(NAN, NAN, NAN, NAN, NAN, s, p, k, join("no decomposition", note))
    cells = table.mean(axis=2)
    seeds, prompts, mean = cells.mean(axis=1), cells.mean(axis=0), table.mean()
    left = cells - seeds[:, None] - prompts[None, :] + mean
    of_seeds = p * k * float(seeds.var(ddof=1))
    of_prompts = s * k * float(prompts.var(ddof=1))
    of_both = k * float((left**2).sum()) / ((s - 1) * (p - 1))
    of_latents = of_rest = 0.0
    if k > 1:
        pairs = table.mean(axis=0)
        of_latents = s * float(((pairs - prompts[:, None]) ** 2).sum()) / (p * (k - 1))
        rest = table - cells[:, :, None] - pairs[None] + prompts[None, :, None]
        of_rest = float((rest**2).sum()) / ((s - 1) * p * (k - 1))
    return Components(
        seed=(of_seeds - of_both) / (p * k),
        prompt=(of_prompts - of_both - of_latents + of_rest) / (s * k),
        latent=(of_latents - of_rest) / s,
        seed_prompt=(of_both - of_rest) / k,
        residual=of_rest,
        seeds=s,
        prompts=p,
        latents=k,
        note=note,
    )


def _not_negative(outer: float, inner: float, latents: int) -> tuple[float, float]:
    """Two nested components without a negative one, outer + inner / K as before where that is not negative itself."""
    total = max(outer + inner / latents, 0.0) if latents else NAN
    if outer < 0:
        return 0.0, total * latents
    return (total, 0.0) if inner < 0 else (outer, inner)


def _per_prompt(outer: float, inner: float, estimated: int, latents: int) -> float:
    """Outer + inner / K; with one latent both are in the outer one, and nothing is known for other K."""
    if estimated == 1:
        return outer if latents == 1 else NAN
    return outer + inner / latents
