"""Noise optimisation: gradient ascent on the initial latent (DOODL, Wallace et al. 2023; DRaFT's baseline).

    n = ||x_T||
    for i = 1..I:
        g = grad_{x_T} r(decode(sample(theta_base, c, x_T)), c)  # through all T steps
        x_T = Adam(x_T, g);   x_T = n * x_T / ||x_T||
    return sample(theta_base, c, x_T)

Cost of a picture: I chains forward and backward (forward again where checkpointed), I decodes and queries, and a last
chain forward. I = 0 is the base sampler.
As in the DRaFT paper's variant, gradient checkpointing replaces DOODL's invertible sampler (EDICT) and Adam its
momentum. Left out of DOODL: its tied pair of latents, clipping of the gradient's elements at 1e-3, the perturbation
with noise 1e-4, and the multi-crop of its rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from harness.api import (
    BASE,
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Diverged,
    Generation,
    InferenceConfig,
    InferenceFineTuner,
    Request,
    Reward,
    SamplerConfig,
)
from harness.sampling import evaluation_noise, initial_latents, sample


class NoiseOptimisationConfig(InferenceConfig):
    """Noise optimisation's settings."""

    iterations: int = Field(50, ge=0, description="Updates of each initial latent, I. DOODL: 50.")
    learning_rate: float = Field(
        0.05,
        gt=0,
        description="Adam's, per element of x_T, whose size is 1. This project's choice; the paper's is unknown.",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's default; not stated in the DRaFT paper.")


class NoiseOptimisation(InferenceFineTuner):
    """Noise optimisation: Adam on the initial latent, its norm kept."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = NoiseOptimisationConfig

    def __init__(
        self, model: DiffusionModel, reward: Reward, config: NoiseOptimisationConfig, context: Context
    ) -> None:
        self.model, self.reward, self.config, self.context = model, reward, config, context

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """The chains from the optimised initial latents."""
        sampler = generation.sampler
        optimised = [self.optimise(part, sampler) for part in self.context.micro_batches(requests)]
        with torch.no_grad():
            return self.chain(torch.cat(optimised), requests, sampler)

    def optimise(self, requests: Sequence[Request], sampler: SamplerConfig) -> Tensor:
        """x_T after all updates, (B, C, H, W). Rows do not touch: Adam works element by element."""
        x = initial_latents(self.model, requests)
        norms = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
        adam = torch.optim.Adam([x], lr=self.config.learning_rate, betas=self.config.betas)
        for _ in range(self.config.iterations):
            x.grad = -self.gradient(x, requests, sampler)
            adam.step()
            x.mul_(norms / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True))
        return x

    def gradient(self, x_T: Tensor, requests: Sequence[Request], sampler: SamplerConfig) -> Tensor:
        """grad_{x_T} r, each row of its own picture's reward."""
        with torch.enable_grad():
            x_T = x_T.detach().requires_grad_()
            latents = self.chain(x_T, requests, sampler, gradient_steps=sampler.steps)
            rewards = self.reward(self.model.decode(latents), [request.prompt for request in requests])
            (gradient,) = torch.autograd.grad(rewards.sum(), x_T)
        if not (rewards.isfinite().all() and gradient.isfinite().all()):
            raise Diverged("the reward of a picture, or its gradient at the initial latent, is not finite")
        return gradient

    def chain(
        self, x_T: Tensor, requests: Sequence[Request], sampler: SamplerConfig, gradient_steps: int = 0
    ) -> Tensor:
        """The base model's chain. Noise of a stochastic sampler is the evaluation's, the same in every update."""
        return sample(
            self.model,
            x_T,
            self.model.condition([request.prompt.text for request in requests]),
            sampler,
            adapter=BASE,
            gradient_steps=gradient_steps,
            checkpointing=self.checkpointed(sampler, gradient_steps),
            noise=evaluation_noise(self.model, requests),
        )

    def checkpointed(self, sampler: SamplerConfig, gradient_steps: int) -> bool:
        """Whether chains are checkpointed: one decision by the largest batch, so that the cost is known beforehand."""
        rows = self.model.rows_per_latent(sampler.guidance)
        return self.context.checkpointing(gradient_steps, self.context.micro_batch * rows)

    def planned_cost(self) -> CostRange:
        """Of one picture: I differentiated chains and their rewards, and the last chain."""
        sampler = self.context.sampler
        rows = sampler.steps * self.model.rows_per_latent(sampler.guidance)
        update = Cost(
            gradient_rows=rows,
            recomputed_rows=rows if self.checkpointed(sampler, sampler.steps) else 0,
            backward_rows=rows,
            decodes=1,
            queries=1,
            reward_gradients=1,
        )
        cost = update * self.config.iterations + Cost(forward_rows=rows)
        return CostRange(cost, cost)
