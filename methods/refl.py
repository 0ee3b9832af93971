"""ReFL: the reward of a one-step prediction from a random late step (Xu et al., NeurIPS 2023; DRaFT's Algorithm 1).

    t ~ U{1..m};  run the chain without gradient to x_t;  theta <- theta + eta * grad_theta r(x0_hat(x_t), c)

Cost of an update of B pictures: T - t steps forward, one with gradient, B queries.
Differs from ReFL's released code in: guidance is used in training and the adapter is a LoRA (as in DRaFT's
comparison). With m = 1 and a clean final target it is DRaFT-1.
`pretraining` adds the paper's other loss, which the released code lacks: w * mean((eps - eps_theta(x_t))^2) at one
random training timestep, without guidance. Its data are the base model's own pictures of the same requests.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from harness.api import BASE, Context, Cost, CostRange, DiffusionModel, Randomness, Reward
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class ReFLConfig(RewardGradientConfig):
    """ReFL's settings."""

    m: int = Field(20, ge=1, description="t is drawn from the last m steps. DRaFT's comparison: 20 of 50.")
    hinge: float | None = Field(
        None, description="Loss relu(hinge - r) instead of -r: no gradient above it. ReFL's code: 2 (ImageReward)."
    )
    pretraining: float = Field(
        0.0,
        ge=0,
        description="Weight of the pre-training loss. ReFL's code: none; paper: 1 beside a reward loss scaled by 1e-3.",
    )


class ReFL(RewardGradientTuner[ReFLConfig]):
    """ReFL: the reward's gradient through a one-step prediction from a random late step."""

    version = "1"
    stochastic = True
    needs_reward_gradient = True
    Config = ReFLConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: ReFLConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.require_steps("refl.m", config.m)

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x0_hat(x_t)), or relu(hinge - r), at one t for the whole update."""
        remaining = 1 + draws.integer("t", below=self.config.m)
        step = self.steps[-remaining]
        x_t = self.chain(batch, gradient_steps=0, stop=step.index)
        reward = self.score(self.predict(x_t, step.t, batch).x0, batch)
        loss = -reward if self.config.hinge is None else (self.config.hinge - reward).relu()
        if self.config.pretraining > 0:
            loss = loss + self.config.pretraining * self.denoising_loss(batch, draws)
        return Objective(loss=loss, reward=reward)

    def denoising_loss(self, batch: Batch, draws: Randomness) -> Tensor:
        """Mean squared error (B,) of the noise in the base model's pictures, at one timestep for the whole update."""
        x_0 = self.chain(batch, gradient_steps=0, adapter=BASE)
        t = self.model.draw_timestep(draws, "pretraining timestep")
        keys = [(r.prompt.id, r.noise_id) for r in batch.requests]
        noise = torch.stack([draws.normal(self.model.latent_shape, "pretraining", *key) for key in keys]).to(x_0)
        prediction = self.predict(self.model.noised(x_0, t, noise), t, batch, guidance=1.0)
        return (prediction.noise - noise).square().flatten(1).mean(1)

    def planned_cost(self) -> CostRange:
        """T - t forward steps: on average T - (m+1)/2, at most T - 1; one step carries gradient, not checkpointed."""
        one_step = self.config.batch_size * self.rows_per_picture
        gradient = Cost(gradient_rows=one_step, backward_rows=one_step) + self.scoring_cost()
        T = len(self.steps)
        if self.config.pretraining > 0:
            denoised = self.config.batch_size
            gradient = gradient + self.chain_cost(0, T) + Cost(gradient_rows=denoised, backward_rows=denoised)
        expected = self.chain_cost(0, 1) * (T - (self.config.m + 1) / 2) + gradient
        return CostRange(expected, self.chain_cost(0, 1) * (T - 1) + gradient)
