"""Sequential Monte Carlo: particles of a stochastic sampler, resampled by their rewards (FK steering, Singhal et al.).

    x^j_T ~ N(0, I),  j = 1..N;   log w^j = 0;   log Z^j = 0          # Z: product of a particle's potentials so far
    for t = T..1:
        x^j_{t-1} ~ p_theta_base(. | x^j_t, c)
        at chosen t:  r^j = r(decode(x0_hat(x^j_t)), c);   log w^j += log G^j;   log Z^j += log G^j
                      if 1/sum_j w^j^2 (normalised) < e*N: resample particles in proportion to w, w = 1
    log w^j += lambda * r(decode(x^j_0), c) - log Z^j                # the product of all potentials: exp(lambda r)
    return the particle of the largest reward, or one drawn in proportion to w

log G is lambda times the change of r (diff), its maximum so far (max) or its sum so far (add). Drawn by weight, the
picture is one of p_base(x_0) exp(lambda*r(x_0)) as N grows. Cost of a picture: N chains forward, N queries at each
chosen step and at the end, whether or not particles are resampled.
Differs from the released code in: systematic instead of multinomial resampling; weights of particles that are not
resampled are carried on (the code drops them); the maximum starts at the first reward instead of at 0. The first
particle is the request's own latent with the evaluation's noise: at lambda 0 it is the base sampler at this eta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    Prediction,
    Request,
    Reward,
    SamplerConfig,
    UserError,
)
from harness.sampling import Step, evaluation_noise, initial_latents, sample, step_noise


class SMCConfig(InferenceConfig):
    """Settings of steering with particles."""

    particles: int = Field(4, ge=1, description="N, for each picture. FK steering: 4.")
    lmbda: float = Field(10.0, ge=0, description="lambda, in 1/reward. FK steering: 10.")
    potential: Literal["diff", "max", "add"] = Field("diff", description="What weighs particles on the way.")
    resample_at: tuple[float, ...] = Field(
        (0.2, 0.4, 0.6, 0.8),
        description="Fractions of the chain where particles are weighed. FK steering: 0.2 ... 0.8.",
    )
    ess: float = Field(0.5, ge=0, le=1, description="e: resample below this share of effective particles. FK: 0.5.")
    eta: float = Field(1.0, gt=0, le=1, description="Noise of the steps. FK steering: 1.")
    select: Literal["best", "draw"] = Field(
        "best", description="Return the particle of the largest reward (FK steering's evaluation), or draw by weight."
    )


@dataclass(frozen=True)
class Swarm:
    """The particles of B requests. Logarithms in double precision on the CPU.

    Attributes:
        x: Latents (N, B, C, H, W).
        log_weight: Of each particle since it was last resampled, (N, B).
        log_product: Of the potentials along its whole line, (N, B).
        seen: What the potential remembers of the line's rewards, (N, B).
    """

    x: Tensor
    log_weight: Tensor
    log_product: Tensor
    seen: Tensor


class SMC(InferenceFineTuner):
    """SMC: steered particles of a stochastic sampler, resampled by the rewards of their one-step predictions."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = SMCConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: SMCConfig, context: Context) -> None:
        self.model, self.reward, self.config, self.context = model, reward, config, context
        outside = [fraction for fraction in config.resample_at if not 0 <= fraction < 1]
        if outside:
            raise UserError(f"resample_at has {outside[0]}; give fractions of the chain from 0 to below 1")

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """One particle of each request, by the base model with this method's eta."""
        sampler = generation.sampler.model_copy(update={"eta": self.config.eta})
        return torch.cat([self.steer(part, sampler) for part in self.context.micro_batches(requests)])

    def steer(self, requests: Sequence[Request], sampler: SamplerConfig) -> Tensor:
        """The chosen particle of each request, (B, C, H, W)."""
        swarm, start = self.initial(requests), 0
        for index in self.weighed(sampler):
            x, x0 = self.advance(swarm.x, requests, sampler, start, index + 1)
            swarm, start = self.resample(self.weigh(swarm, x, self.score(x0, requests)), requests, index), index + 1
        x, _ = self.advance(swarm.x, requests, sampler, start, sampler.steps)
        tilt = self.config.lmbda * self.score(x, requests)
        if self.config.select == "best":
            chosen = tilt.argmax(0)  # the first of equals
        else:
            chosen = self.draw(swarm.log_weight + tilt - swarm.log_product, requests)
        return x[chosen, torch.arange(len(requests))]

    def weighed(self, sampler: SamplerConfig) -> list[int]:
        """Indices of the steps whose predictions weigh the particles; after the last step the pictures do."""
        indices = {int(fraction * sampler.steps + 1e-9) for fraction in self.config.resample_at}
        return sorted(indices - {sampler.steps - 1})

    def initial(self, requests: Sequence[Request]) -> Swarm:
        """The request's own latent and N - 1 others, all of weight 1."""
        own = initial_latents(self.model, requests)
        x = [own]
        for particle in range(1, self.config.particles):
            draws = self.context.randomness.child("particle", particle)
            rows = [draws.normal(self.model.latent_shape, "x_T", r.prompt.id, r.noise_id) for r in requests]
            x.append(torch.stack(rows).to(own))
        zero = torch.zeros(self.config.particles, len(requests), dtype=torch.float64)
        return Swarm(torch.stack(x), zero, zero, zero - torch.inf if self.config.potential == "max" else zero)

    def advance(
        self, x: Tensor, requests: Sequence[Request], sampler: SamplerConfig, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Latents before step `stop`, and the clean latents predicted at the step before; one particle at a time."""
        condition = self.model.condition([request.prompt.text for request in requests])
        predicted: list[Tensor] = []

        def predict(step: Step, x_t: Tensor) -> Prediction:
            prediction = self.model.predict(x_t, step.t, condition, guidance=sampler.guidance, adapter=BASE)
            if step.index == stop - 1:
                predicted.append(prediction.x0)
            return prediction

        after = []
        for particle, latents in enumerate(x):
            noise = evaluation_noise(self.model, requests)
            if particle > 0:
                draws = self.context.randomness.child("particle", particle)
                noise = step_noise(self.model, requests, draws, "step")
            after.append(
                sample(self.model, latents, condition, sampler, noise=noise, start=start, stop=stop, predict=predict)
            )
        return torch.stack(after), torch.stack(predicted)

    def score(self, latents: Tensor, requests: Sequence[Request]) -> Tensor:
        """Rewards of all particles' pictures, (N, B)."""
        prompts = [request.prompt for request in requests]
        rewards = torch.stack([self.reward(self.model.decode(x), prompts) for x in latents])
        if not rewards.isfinite().all():
            raise Diverged("the reward of a particle is not finite")
        return rewards.double().cpu()

    def weigh(self, swarm: Swarm, x: Tensor, rewards: Tensor) -> Swarm:
        """The particles at x, their weights multiplied by the potential of these rewards."""
        match self.config.potential:
            case "diff":
                value, seen = rewards - swarm.seen, rewards
            case "max":
                value = seen = torch.maximum(rewards, swarm.seen)
            case "add":
                value = seen = rewards + swarm.seen
        log_potential = self.config.lmbda * value
        return Swarm(x, swarm.log_weight + log_potential, swarm.log_product + log_potential, seen)

    def resample(self, swarm: Swarm, requests: Sequence[Request], index: int) -> Swarm:
        """Particles drawn in proportion to their weights, for those requests where too few are effective."""
        N = self.config.particles
        log_weight = swarm.log_weight.clone()
        ancestors = torch.arange(N)[:, None].repeat(1, len(requests))
        for column, request in enumerate(requests):
            weights = log_weight[:, column].softmax(0)
            if 1 / float(weights.square().sum()) < self.config.ess * N:
                ancestors[:, column] = systematic(weights, self.uniform(request, "resample", index), N)
                log_weight[:, column] = 0
        columns = torch.arange(len(requests))
        moved = (field[ancestors, columns] for field in (swarm.log_product, swarm.seen))
        return Swarm(swarm.x[ancestors, columns], log_weight, *moved)

    def draw(self, log_weights: Tensor, requests: Sequence[Request]) -> Tensor:
        """One particle of each request in proportion to its weight, (B,); of equals, which are alike, the first."""
        chosen = torch.zeros(len(requests), dtype=torch.long)
        for column, request in enumerate(requests):
            logs = log_weights[:, column]
            if logs.min() < logs.max():
                chosen[column] = systematic(logs.softmax(0), self.uniform(request, "draw", 0), 1)[0]
        return chosen

    def uniform(self, request: Request, purpose: str, index: int) -> float:
        """A number in [0, 1) that belongs to the request."""
        keys = (purpose, request.prompt.id, request.noise_id, index)
        return self.context.randomness.integer(*keys, below=2**53) / 2**53

    def planned_cost(self) -> CostRange:
        """Of one picture: N chains, N queries at each weighed step and at the end, resampled or not."""
        sampler = self.context.sampler
        N, rows = self.config.particles, self.model.rows_per_latent(sampler.guidance)
        scored = N * (len(self.weighed(sampler)) + 1)
        cost = Cost(forward_rows=N * rows * sampler.steps, decodes=scored, queries=scored)
        return CostRange(cost, cost)


def systematic(weights: Tensor, uniform: float, count: int) -> Tensor:
    """`count` indices in proportion to the weights, which sum to 1: where (uniform + i)/count falls in their sums."""
    positions = (uniform + torch.arange(count, dtype=weights.dtype)) / count
    return torch.searchsorted(weights.cumsum(0), positions, right=True).clamp_max(len(weights) - 1)
