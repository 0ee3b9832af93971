"""Several pictures of one prompt: their requests, and which of them the reward prefers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.api import DiffusionModel, Randomness, Request


def candidate(
    request: Request, index: int, model: DiffusionModel, draws: Randomness, purpose: str = "candidate"
) -> Request:
    """The index-th picture of a request: the request itself, then others whose latents and ids its own ids give.

    The id gives them other noise of the steps, too, where the sampler has some.
    """
    if index == 0:
        return request
    keys = (purpose, request.prompt.id, request.noise_id, index)
    return Request(request.prompt, draws.integer(*keys, "id"), draws.normal(model.latent_shape, *keys))


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, by their places in a collection; weight 0 where the reward prefers neither."""

    winner: int
    loser: int
    weight: float


def ranked_pairs(rewards_GK: Tensor) -> list[Pair]:
    """The best and the worst of the K pictures of each of G prompts; picture k of prompt g has place g*K + k."""
    G, K = rewards_GK.shape
    best, worst = rewards_GK.argmax(1).tolist(), rewards_GK.argmin(1).tolist()
    pairs = []
    for g in range(G):
        tied = best[g] == worst[g]
        loser = (best[g] + 1) % K if tied else worst[g]
        pairs.append(Pair(g * K + best[g], g * K + loser, 0.0 if tied else 1.0))
    return pairs
