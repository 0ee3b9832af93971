"""Adjoint matching: regress the change of each noisy step on a lean adjoint (Domingo-Enrich et al., ICLR 2025).

    x_{t-1} = mu_theta(x_t) + s_t * eps_t,   eta = 1                          # the memoryless noise schedule
    a_0 = -lambda * grad r(x_0),   a_t = (d mu_base / d x_t)^T a_{t-1}        # lean adjoint: base steps, stored states
    L = mean_t  1/2 * | (mu_theta(x_t) - mu_base(x_t)) / s_t + s_t * a_{t-1} |^2

The minimum is the base model tilted by exp(lambda * r), not the reward's maximum: the first term is the KL divergence
of a step from the base. At the base weights the gradient of L is that of -lambda * r(x_0) through the noisy chain.
Cost of an iteration of B pictures: T steps forward to sample; one base step forward, T - 1 forward and backward for
the adjoint, S forward and backward for the regression; B queries with gradient. No chain is ever kept in memory.
Differs from the paper in: LoRA instead of all weights. From the authors' code for Stable Diffusion in: a step is
paired with the adjoint of the state that it leads to (there: from which it starts; they differ by one step, and this
pairing is exact at any T); the threshold of the clipping is made of earlier iterations alone, so that it does not
depend on micro-batches; the run's noise levels, where a last step onto a clean latent has no noise and is left out
(there the final alpha is set so that it has some).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from harness.api import (
    BASE,
    Adapter,
    Conditioning,
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Diverged,
    MethodConfig,
    Randomness,
    Request,
    Reward,
    TrainedFineTuner,
    UserError,
)
from harness.sampling import Step, Transition, initial_latents, sample, schedule, step_noise, transition

EARLY = 0.6  # where the code for Stable Diffusion parts the noisy steps that it stores into an early and a late half


class AdjointMatchingConfig(MethodConfig):
    """Adjoint matching's settings."""

    batch_size: int = Field(4, ge=1, description="Trajectories per update. The authors' code: 125 (5 x 25).")
    reward_multiplier: float = Field(
        100.0, ge=0, description="lambda: how far to tilt; in units of 1/reward. The authors' code: 100 (ImageReward)."
    )
    stored_steps: int | None = Field(
        2,
        ge=1,
        description="S: noisy steps per iteration that are regressed, half of them (rounded down) from the first 60 %, "
        "the others from the rest; None: all. The authors' code: 4, of 50.",
    )
    clip_quantile: float | None = Field(
        0.9,
        gt=0,
        lt=1,
        description="Drop losses above this quantile, averaged over earlier iterations; None: keep all.",
    )
    clip_decay: float = Field(0.9, ge=0, lt=1, description="Decay of that average. The authors' code: 0.9.")
    guided_adjoint: bool = Field(
        False, description="Guidance in adjoint and regression, too. The authors' code: only while sampling."
    )


@dataclass(frozen=True)
class Point:
    """One step of the adjoint pass: the state x_t, the base's mean from there, and a_{t-1}; each (B, C, H, W)."""

    state: Tensor
    base_mean: Tensor
    adjoint: Tensor


class AdjointMatching(TrainedFineTuner):
    """Adjoint matching: stochastic optimal control towards the reward-tilted model, by regression."""

    version = "1"
    stochastic = True
    needs_reward_gradient = True
    Config = AdjointMatchingConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: AdjointMatchingConfig, context: Context) -> None:
        self.model, self.reward, self.config, self.context = model, reward, config, context
        self.sampler = self.training_sampler = context.sampler.model_copy(update={"eta": 1.0})
        self.guidance = self.sampler.guidance if config.guided_adjoint else 1.0
        self.steps = schedule(model, self.sampler)
        noisy = [step.index for step in self.steps if step.std > 0]
        split = round(EARLY * len(noisy))
        self.early, self.late = noisy[:split], noisy[split:]
        self.stored = len(noisy) if config.stored_steps is None else config.stored_steps
        self.from_early = split if self.stored == len(noisy) else self.stored // 2
        if not noisy:
            raise UserError("adjoint-matching needs at least one noisy step; raise sampler.steps to 2 or more")
        if self.from_early > split or self.stored - self.from_early > len(self.late):
            raise UserError(
                f"adjoint-matching.stored_steps={self.stored} takes half of its steps from the first {split} noisy "
                f"ones and half from the last {len(self.late)}; lower it, raise sampler.steps, or give null for all"
            )
        self.optimizer = context.optimizer(list(model.adapter_parameters().values()), config.optimizer)
        self.threshold = math.inf

    @property
    def requests_per_iteration(self) -> int:
        """One batch."""
        return self.config.batch_size

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """Sample, run the adjoint back along the stored states, and take one step of the regression."""
        chosen = self.choose(self.context.randomness.child("iteration", requests[0].noise_id))
        losses, rewards = [], []
        self.optimizer.zero_grad()
        for part in self.context.micro_batches(requests):
            condition = self.model.condition([request.prompt.text for request in part])
            scores, terminal, states = self.trajectory(part, condition)
            points = self.adjoint(states, terminal, condition)
            rewards.append(scores)
            for index in chosen:
                loss = self.loss(self.steps[index], points[index], condition)
                kept = loss * (loss.detach().sqrt() <= self.threshold)
                (kept.sum() / (len(requests) * len(chosen))).backward()
                losses.append(loss.detach())
        reward, loss = torch.cat(rewards).mean().item(), torch.cat(losses)
        if not math.isfinite(reward):
            raise Diverged(f"the reward of the training pictures is {reward}")
        norm = self.optimizer.step()
        clipped = (loss.sqrt() > self.threshold).double().mean().item()
        self.remember(loss)
        return {"reward": reward, "loss": loss.mean().item(), "clipped": clipped, "gradient_norm": norm}

    def choose(self, draws: Randomness) -> list[int]:
        """Indices of the steps that are regressed in this iteration, the same for all its pictures."""
        early = draws.permutation(len(self.early), "early")[: self.from_early]
        late = draws.permutation(len(self.late), "late")[: self.stored - self.from_early]
        return sorted([self.early[i] for i in early] + [self.late[i] for i in late])

    def trajectory(self, requests: Sequence[Request], condition: Conditioning) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Rewards (B,), the terminal adjoint a_0 and the states x_T..x_1 of one memoryless chain."""
        states: list[Tensor] = []

        def observe(step: Step, x: Tensor, policy: Transition, x_next: Tensor) -> None:
            states.append(x)

        noise = step_noise(self.model, requests, self.context.randomness, "trajectory")
        x_T = initial_latents(self.model, requests)
        with torch.no_grad():
            x_0 = sample(self.model, x_T, condition, self.sampler, noise=noise, observe=observe)
        x_0.requires_grad_()
        scores = self.reward(self.model.decode(x_0), [request.prompt for request in requests])
        (gradient,) = torch.autograd.grad(scores.sum(), x_0)
        return scores.detach(), -self.config.reward_multiplier * gradient, states

    def mean(self, x: Tensor, step: Step, condition: Conditioning, adapter: Adapter) -> Tensor:
        """mu(x_t) of the trained model or of the base."""
        prediction = self.model.predict(x, step.t, condition, guidance=self.guidance, adapter=adapter)
        return transition(prediction, step).mean

    def adjoint(self, states: Sequence[Tensor], terminal: Tensor, condition: Conditioning) -> list[Point]:
        """The lean adjoint along the states: vector-Jacobian products of the base's steps, the adapter off."""
        adjoint, points = terminal, []
        for step in reversed(self.steps):
            needed = step.index > 0  # nothing comes before x_T
            state = states[step.index].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                base_mean = self.mean(state, step, condition, BASE)
            points.append(Point(state.detach(), base_mean.detach(), adjoint))
            if needed:
                (adjoint,) = torch.autograd.grad(base_mean, state, adjoint)
        return points[::-1]

    def loss(self, step: Step, point: Point, condition: Conditioning) -> Tensor:
        """The regression at one step, summed over latent dimensions, (B,)."""
        change = self.mean(point.state, step, condition, Adapter()) - point.base_mean
        return 0.5 * (change / step.std + step.std * point.adjoint).square().flatten(1).sum(1)

    def remember(self, losses: Tensor) -> None:
        """Move the threshold of the square root of the loss towards this iteration's quantile."""
        if self.config.clip_quantile is not None:
            quantile = torch.quantile(losses.sqrt().double(), self.config.clip_quantile).item()
            decay = self.config.clip_decay if math.isfinite(self.threshold) else 0.0
            self.threshold = quantile if decay == 0 else decay * self.threshold + (1 - decay) * quantile

    def planned_cost(self) -> CostRange:
        """Sampling, the base's mean at x_T, T - 1 vector-Jacobian products, and S steps of the regression."""
        T, pictures = len(self.steps), self.config.batch_size
        sampled = pictures * self.model.rows_per_latent(self.sampler.guidance)
        matched = pictures * self.model.rows_per_latent(self.guidance)
        differentiated = matched * (T - 1 + self.stored)
        cost = Cost(
            forward_rows=sampled * T + matched,
            gradient_rows=differentiated,
            backward_rows=differentiated,
            decodes=pictures,
            queries=pictures,
            reward_gradients=pictures,
        )
        return CostRange(cost, cost)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and clipping threshold."""
        return {"optimizer": self.optimizer.state_dict(), "threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore optimiser and clipping threshold."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.threshold = state["threshold"]
