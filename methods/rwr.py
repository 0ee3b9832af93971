"""RWR: reward-weighted regression on one's own pictures (Black et al., ICLR 2024, section 4.1; Lee et al., 2023).

    collect x_0^k ~ sample(theta, c), k = 1..K, for some prompts c
    w_k = softmax_k( r(x_0^k, c) / temperature )          # or: the top fraction weighs equally, the rest nothing
    repeat `epochs` times:  theta <- theta - eta * grad sum_k w_k * |noise_theta(x_t^k, t, c) - noise|^2

Cost of an iteration of B pictures: T steps forward, B queries without gradient, `epochs` single steps with gradient
for each picture (only for those kept, with sparse weights).
Differs from the authors' code in: LoRA instead of all weights; small collections, with one optimiser step per pass;
the temperature is in standard deviations of the rewards unless `temperature_unit` says otherwise, so that it suits
every reward; t is drawn from the sampler's steps; pictures come from the run's sampler (there: eta 1).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.api import Context, DiffusionModel, Reward, UserError
from methods._likelihood import LikelihoodConfig, WeightedLikelihoodTuner


class RWRConfig(LikelihoodConfig):
    """RWR's settings."""

    temperature: float = Field(
        0.5, gt=0, description="Of the softmax; .inf weighs equally. DDPO's code: 0.2 rewards; Pinterest's study: 0.5."
    )
    temperature_unit: Literal["deviation", "reward"] = Field(
        "deviation", description="Standard deviations of the rewards that are compared, or the reward's own unit."
    )
    compare: Literal["prompt", "collection"] = Field(
        "prompt", description="Pictures compete within their prompt, or all together. DDPO's code: both, by task."
    )
    weighting: Literal["softmax", "sparse"] = Field(
        "softmax", description="Softmax of the rewards, or equal weights for the best and none for the others."
    )
    keep: float = Field(
        0.1, gt=0, le=1, description="Fraction that sparse weighting keeps, at least one picture. DDPO's code: 0.1."
    )


class RWR(WeightedLikelihoodTuner[RWRConfig]):
    """RWR: fine-tuning on one's own pictures, weighted by their rewards."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = RWRConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: RWRConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        if config.candidates == 1 and config.compare == "prompt":
            raise UserError("rwr.candidates=1 leaves nothing to compare; raise it, or set rwr.compare=collection")

    @property
    def kept(self) -> int:
        """All, or the best of each comparison."""
        if self.config.weighting == "softmax":
            return self.config.rollout_size
        if self.config.compare == "collection":
            return self.best_of(self.config.rollout_size)
        return self.requests_per_iteration * self.best_of(self.config.candidates)

    def best_of(self, count: int) -> int:
        """How many of `count` pictures sparse weighting keeps."""
        return max(1, round(self.config.keep * count))

    def weights(self, rewards_GK: Tensor) -> Tensor:
        """Softmax weights, or equal ones for the best of each comparison (the first of equals)."""
        compared = rewards_GK if self.config.compare == "prompt" else rewards_GK.reshape(1, -1)
        if self.config.weighting == "softmax":
            centred = compared - compared.mean(1, keepdim=True)
            if self.config.temperature_unit == "deviation":
                centred = centred / (compared.std(1, correction=0, keepdim=True) + 1e-6)
            weights = torch.softmax(centred / self.config.temperature, 1)
        else:
            size = self.best_of(compared.shape[1])
            best = compared.argsort(dim=1, descending=True, stable=True)[:, :size]
            weights = torch.zeros_like(compared).scatter(1, best, 1 / size)
        return (weights / len(compared)).view_as(rewards_GK)
