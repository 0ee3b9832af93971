"""Rollouts: trajectories of the stochastic sampler with the log-probabilities of their actions.

Denoising is a Markov decision process of T actions (Black et al., ICLR 2024): the state is (c, t, x_t), the action
x_{t-1} ~ N(mean_theta, std_t^2) of the stochastic sampler, and the reward comes at the end. A step without noise is no
action and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from harness.api import (
    Adapter,
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Diverged,
    MethodConfig,
    Request,
    Reward,
    TrainedFineTuner,
    UserError,
)
from harness.sampling import (
    Step,
    Transition,
    initial_latents,
    log_probability,
    sample,
    schedule,
    step_noise,
    transition,
)


class RolloutConfig(MethodConfig):
    """Settings of everything that learns from the actions of its own rollouts."""

    rollout_size: int = Field(32, ge=1, description="Pictures per iteration. DDPO's code: 256.")
    updates_per_rollout: int = Field(2, ge=1, description="Optimiser steps per pass over a rollout. DDPO's code: 2, 4.")
    eta: float = Field(1.0, gt=0, le=1, description="Noise of the training sampler. DDPO: 1.")


@dataclass(frozen=True)
class Rollout:
    """One picture's trajectory: states and actions of its A noisy steps, and what the policy said when it acted.

    Attributes:
        request: What was asked for.
        states: (A, C, H, W).
        actions: (A, C, H, W).
        log_probabilities: (A,), of the policy that acted.
        reward: Of the final picture.
    """

    request: Request
    states: Tensor
    actions: Tensor
    log_probabilities: Tensor
    reward: float


RolloutConfigT = TypeVar("RolloutConfigT", bound=RolloutConfig)


class RolloutTuner(TrainedFineTuner, Generic[RolloutConfigT]):
    """Samples trajectories with noise at every step, and says how probable their actions are under an adapter."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: RolloutConfigT, context: Context) -> None:
        if config.rollout_size % config.updates_per_rollout:
            raise UserError(
                f"rollout_size={config.rollout_size} must be a multiple of "
                f"updates_per_rollout={config.updates_per_rollout}"
            )
        self.model, self.reward, self.config, self.context = model, reward, config, context
        self.sampler = self.training_sampler = context.sampler.model_copy(update={"eta": config.eta})
        self.steps = schedule(model, self.sampler)
        self.actions = [step for step in self.steps if step.std > 0]
        if not self.actions:
            raise UserError("a policy gradient needs at least one noisy step; raise sampler.steps to 2 or more")
        self.optimizer = context.optimizer(list(model.adapter_parameters().values()), config.optimizer)

    def collect_all(self, requests: Sequence[Request]) -> tuple[list[Rollout], Tensor]:
        """Trajectories of all requests, and their rewards (B,) in double precision.

        Raises:
            Diverged: A reward is not finite.
        """
        rollouts = [r for part in self.context.micro_batches(requests) for r in self.collect(part)]
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
        if not rewards.isfinite().all():
            raise Diverged("a reward of the rollout is not finite")
        return rollouts, rewards

    @torch.no_grad()
    def collect(self, requests: Sequence[Request]) -> list[Rollout]:
        """Sample trajectories of the current policy and score their pictures."""
        condition = self.model.condition([r.prompt.text for r in requests])
        states, actions, log_probabilities = [], [], []

        def observe(step: Step, x: Tensor, policy: Transition, x_next: Tensor) -> None:
            if step.std > 0:
                states.append(x)
                actions.append(x_next)
                log_probabilities.append(log_probability(x_next, policy))

        x_0 = sample(
            self.model,
            initial_latents(self.model, requests),
            condition,
            self.sampler,
            noise=step_noise(self.model, requests, self.context.randomness, "rollout"),
            observe=observe,
        )
        rewards = self.reward(self.model.decode(x_0), [r.prompt for r in requests])
        return [
            Rollout(
                request,
                torch.stack([s[row] for s in states]),
                torch.stack([a[row] for a in actions]),
                torch.stack([p[row] for p in log_probabilities]),
                float(rewards[row]),
            )
            for row, request in enumerate(requests)
        ]

    def policy(
        self,
        state: Tensor,
        step: Step,
        requests: Sequence[Request],
        adapter: Adapter = Adapter(),  # noqa: B008 - frozen
    ) -> Transition:
        """What an adapter (the one that is trained) does in states (B, C, H, W), guidance included."""
        condition = self.model.condition([r.prompt.text for r in requests])
        prediction = self.model.predict(state, step.t, condition, guidance=self.sampler.guidance, adapter=adapter)
        return transition(prediction, step)

    def log_policy(
        self,
        state: Tensor,
        action: Tensor,
        step: Step,
        requests: Sequence[Request],
        adapter: Adapter = Adapter(),  # noqa: B008 - frozen
    ) -> Tensor:
        """Log-probability (B,) of actions under an adapter (the one that is trained), guidance included."""
        return log_probability(action, self.policy(state, step, requests, adapter))

    def cost(self, reference_steps: int = 0) -> CostRange:
        """T forward steps to sample, `reference_steps` more without gradient, A with gradient for the A actions."""
        pictures = self.config.rollout_size
        rows = pictures * self.model.rows_per_latent(self.sampler.guidance)
        trained = rows * len(self.actions)
        cost = Cost(
            forward_rows=rows * (len(self.steps) + reference_steps),
            gradient_rows=trained,
            backward_rows=trained,
            decodes=pictures,
            queries=pictures,
        )
        return CostRange(cost, cost)
