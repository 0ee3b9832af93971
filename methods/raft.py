"""RAFT: fine-tune on the best of K pictures of each prompt, again and again (Dong et al., TMLR 2023).

    collect x_0^k ~ sample(theta, c), k = 1..K, for some prompts c
    keep x_0^* = the x_0^k with the largest r(x_0^k, c)
    repeat `epochs` times:  theta <- theta - eta * grad |noise_theta(x_t^*, t, c) - noise|^2

Cost of an iteration of B pictures: T steps forward, B queries without gradient, `epochs` single steps with gradient
for each of the B / K kept ones.
Differs from the paper in: LoRA instead of all weights; small collections, with one optimiser step per pass; t is drawn
from the sampler's steps; the loss is that of the guided prediction unless `guided_loss` is off.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from methods._likelihood import LikelihoodConfig, WeightedLikelihoodTuner


class RAFTConfig(LikelihoodConfig):
    """RAFT's settings."""

    candidates: int = Field(4, ge=1, description="Pictures of each prompt, K; one is kept. Pinterest's study: 24.")


class RAFT(WeightedLikelihoodTuner[RAFTConfig]):
    """RAFT: fine-tuning on the best of K own pictures of each prompt."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = RAFTConfig

    @property
    def kept(self) -> int:
        """One picture of each prompt."""
        return self.requests_per_iteration

    def weights(self, rewards_GK: Tensor) -> Tensor:
        """Equal ones for the best of each prompt, the first of equals."""
        best = rewards_GK.argmax(1, keepdim=True)
        return torch.zeros_like(rewards_GK).scatter(1, best, 1 / len(rewards_GK))
