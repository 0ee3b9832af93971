"""AlignProp: backpropagate the reward through a random number of last steps (Prabhudesai et al. 2023).

    K ~ p(K) per trajectory;  x_0 = sample(theta, c, x_T) with eta = 1;  eps_theta of the steps before the last K is
    detached;  theta <- theta + lr * grad_theta r(x_0, c)

x_T does not depend on theta, so that detached predictions leave x_K without gradient: at a fixed K this is DRaFT-K.
The K trained steps are contiguous: one draw decides a whole trajectory (a new draw at each step would leave holes).
Cost of an update of B pictures: T steps forward, K of them backward, B queries.
Differs from the released code in: the reward itself instead of 0.01*|r - 10| or 0.01*(1 - r); the early steps run
without a graph, which is the same gradient; pictures with the same K share a chain.
"""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate
from statistics import NormalDist
from typing import Literal

import torch
from pydantic import Field

from harness.api import Context, CostRange, DiffusionModel, Randomness, Request, Reward, UserError
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class AlignPropConfig(RewardGradientConfig):
    """AlignProp's settings."""

    draw: Literal["uniform", "gaussian"] = Field("uniform", description="Of K. Paper: uniform; code: gaussian.")
    k_min: int = Field(1, ge=1, description="Smallest K. AlignProp's code: 1.")
    k_max: int | None = Field(
        None, ge=1, description="Largest K; None: T - 1, as in AlignProp's code. With k_min = k_max it is DRaFT-K."
    )
    mean: float = Field(0.16, description="gaussian: mean of K before rounding up, over T. AlignProp's code: 8 of 50.")
    deviation: float = Field(0.1, gt=0, description="gaussian: deviation of K, over T. AlignProp's code: 5 of 50.")
    per: Literal["trajectory", "update"] = Field(
        "trajectory", description="What one K is drawn for. AlignProp's code: a call of the sampler (1 picture)."
    )
    eta: float = Field(1.0, ge=0, le=1, description="Noise of the training sampler. AlignProp's code: 1; DRaFT: 0.")


class AlignProp(RewardGradientTuner[AlignPropConfig]):
    """AlignProp: the reward's gradient through a random number of last sampling steps."""

    version = "1"
    stochastic = True
    needs_reward_gradient = True
    Config = AlignPropConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: AlignPropConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.sampler = self.training_sampler = context.sampler.model_copy(update={"eta": config.eta})
        T = len(self.steps)
        largest = max(1, T - 1) if config.k_max is None else config.k_max
        self.require_steps("alignprop.k_max", largest)
        if config.k_min > largest:
            raise UserError(f"alignprop.k_min={config.k_min} exceeds the largest K, {largest}; lower it or raise k_max")
        self.ks = range(config.k_min, largest + 1)
        normal = NormalDist(config.mean * T, config.deviation * T)
        self.weights = [1.0 if config.draw == "uniform" else normal.cdf(k) - normal.cdf(k - 1) for k in self.ks]
        if sum(self.weights) <= 0:
            raise UserError("alignprop.mean is too far from k_min and k_max: no K is ever drawn; move it between them")

    def drawn(self, request: Request, draws: Randomness) -> int:
        """K of a request's trajectory."""
        keys = (request.prompt.id, request.noise_id) if self.config.per == "trajectory" else ()
        uniform = draws.integer("k", *keys, below=2**53) / 2**53
        cumulative = list(accumulate(self.weights))
        return self.ks[bisect(cumulative, uniform * cumulative[-1], hi=len(cumulative) - 1)]

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0), x_0 differentiable in the last K steps of each trajectory."""
        ks = [self.drawn(request, draws) for request in batch.requests]
        rewards, order = [], []
        for k in sorted(set(ks)):
            rows = [row for row, own in enumerate(ks) if own == k]
            part = Batch([batch.requests[row] for row in rows], batch.noise[rows], batch.condition[torch.tensor(rows)])
            rewards.append(self.score(self.chain(part, gradient_steps=k), part))
            order += rows
        reward = torch.cat(rewards)[torch.tensor(order).argsort()]
        return Objective(loss=-reward, reward=reward)

    def planned_cost(self) -> CostRange:
        """K steps carry gradient."""
        return self.range_of([self.truncated_cost(k).expected for k in self.ks], self.weights)
