"""Diffusion-DPO on online pairs: prefer the picture with the larger reward (Wallace et al., CVPR 2024).

    collect K pictures of each prompt c;  x^w, x^l = those with the largest and the smallest reward
    repeat `epochs` times, with one t and one noise for both:
        e(x) = |noise_theta(x_t, t, c) - noise|^2,   e_ref(x) = the same without the adapter
        loss = -log sigmoid( -beta/2 * [ (e(x^w) - e_ref(x^w)) - (e(x^l) - e_ref(x^l)) ] )

Cost of an iteration of B pictures: T steps forward, B queries without gradient, and for each of the B / K pairs
`epochs` times two single steps with gradient and two without (the reference).
Differs from the paper in: pairs are the model's own, ranked by the reward, instead of a fixed set ranked by people;
LoRA instead of all weights; t is drawn from the sampler's steps; no warm-up. A pair of equal rewards teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from harness.api import BASE, Adapter, CostRange
from methods._candidates import ranked_pairs
from methods._likelihood import Lesson, LikelihoodConfig, LikelihoodTuner, Picture


class DPOConfig(LikelihoodConfig):
    """Diffusion-DPO's settings."""

    candidates: int = Field(2, ge=2, description="Pictures of each prompt, K; the best and the worst make the pair.")
    beta: float = Field(5000.0, gt=0, description="Strength of the tie to the base. The authors' code: 5000.")
    guided_loss: bool = Field(False, description="The loss is of the guided prediction. The authors' code: no.")


class DPO(LikelihoodTuner[DPOConfig]):
    """Diffusion-DPO: preferences between one's own pictures, ranked by the reward."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = DPOConfig

    def lessons(self, pictures: Sequence[Picture], rewards_GK: Tensor) -> list[Lesson]:
        """Winner and loser of each prompt."""
        pairs = ranked_pairs(rewards_GK)
        return [Lesson((pictures[p.winner], pictures[p.loser]), p.weight / len(pairs)) for p in pairs]

    def loss(self, lessons: Sequence[Lesson], t: float, noise: Tensor) -> Tensor:
        """-log sigmoid of how much better the adapter has become for winners than for losers."""
        pictures = [lesson.pictures[0] for lesson in lessons] + [lesson.pictures[1] for lesson in lessons]
        both = torch.cat([noise, noise])
        with torch.no_grad():
            reference = self.error(pictures, t, both, BASE)
        winner, loser = (self.error(pictures, t, both, Adapter()) - reference).chunk(2)
        return -functional.logsigmoid(-self.config.beta / 2 * (winner - loser))

    def planned_cost(self) -> CostRange:
        """A collection, and `epochs` passes over all pairs with and without the adapter."""
        pictures = 2 * self.requests_per_iteration
        return self.cost(learnt=pictures, reference=pictures)
