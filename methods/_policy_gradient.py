"""What the policy-gradient family shares: rollouts with per-step log-probabilities, and per-prompt advantages.

Denoising is a Markov decision process of T actions (Black et al., ICLR 2024): the state is (c, t, x_t), the action
x_{t-1} ~ N(mean_theta, std_t^2) of the stochastic sampler, and the reward comes at the end. Methods of the family
differ in the surrogate that they maximise. A step without noise is no action and is left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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


class PolicyGradientConfig(MethodConfig):
    """Settings of the whole family."""

    rollout_size: int = Field(32, ge=1, description="Pictures per iteration. DDPO's code: 256.")
    updates_per_rollout: int = Field(2, ge=1, description="Optimiser steps per pass over a rollout. DDPO's code: 2, 4.")
    eta: float = Field(1.0, gt=0, le=1, description="Noise of the training sampler. DDPO: 1.")
    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to this range. DDPO's code: 5.")
    per_prompt_buffer: int = Field(32, ge=1, description="Rewards remembered per prompt. DDPO's code: 16 or 32.")
    per_prompt_minimum: int = Field(
        16, ge=2, description="Below this count the rollout's own mean and deviation are used. DDPO's code: 16."
    )


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


class PromptStatistics:
    """Running mean and standard deviation of rewards per prompt (Black et al. 2024, section 4 and its code).

    Args:
        buffer: How many rewards are remembered per prompt.
        minimum: Prompts with fewer rewards fall back on the statistics of the current rollout.
    """

    def __init__(self, buffer: int, minimum: int) -> None:
        self.buffer, self.minimum = buffer, minimum
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """(reward - mean) / (std + 1e-6), (B,), after adding these rewards to the buffers."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        values = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            seen = self.rewards[prompt]
            pool = torch.tensor(seen, dtype=rewards.dtype) if len(seen) >= self.minimum else rewards
            values.append((reward - pool.mean()) / (pool.std(correction=0) + 1e-6))
        return torch.stack(values)

    def state_dict(self) -> dict[str, list[float]]:
        """The buffers."""
        return {prompt: list(seen) for prompt, seen in self.rewards.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restore the buffers."""
        self.rewards = {prompt: deque(seen, maxlen=self.buffer) for prompt, seen in state.items()}


ConfigT = TypeVar("ConfigT", bound=PolicyGradientConfig)


class PolicyGradientTuner(TrainedFineTuner, Generic[ConfigT]):
    """Sample trajectories, turn rewards into advantages, ascend a surrogate. Subclasses give the surrogate."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: ConfigT, context: Context) -> None:
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
        self.statistics = PromptStatistics(config.per_prompt_buffer, config.per_prompt_minimum)

    @abstractmethod
    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """What one action contributes to the objective that is maximised; all (B,)."""

    @property
    def requests_per_iteration(self) -> int:
        """One rollout."""
        return self.config.rollout_size

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """Collect a rollout, then pass over it once in `updates_per_rollout` optimiser steps."""
        rollouts = [r for part in self.context.micro_batches(requests) for r in self.collect(part)]
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
        if not rewards.isfinite().all():
            raise Diverged("a reward of the rollout is not finite")
        advantages = self.statistics.advantages([r.request.prompt.id for r in rollouts], rewards)
        advantages = advantages.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        order = self.context.randomness.permutation(len(rollouts), "order", requests[0].noise_id)
        size = len(rollouts) // self.config.updates_per_rollout
        metrics: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "ratio_deviation": []}
        for start in range(0, len(rollouts), size):
            chosen = order[start : start + size]
            for name, value in self.update([rollouts[i] for i in chosen], advantages[chosen]).items():
                metrics[name].append(value)
        return {"reward": rewards.mean().item(), **{name: sum(v) / len(v) for name, v in metrics.items()}}

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

    def log_policy(self, state: Tensor, action: Tensor, step: Step, requests: Sequence[Request]) -> Tensor:
        """Log-probability (B,) of actions under the current adapter, guidance included."""
        condition = self.model.condition([r.prompt.text for r in requests])
        prediction = self.model.predict(state, step.t, condition, guidance=self.sampler.guidance, adapter=Adapter())
        return log_probability(action, transition(prediction, step))

    def update(self, rollouts: Sequence[Rollout], advantages: Tensor) -> dict[str, float]:
        """One optimiser step on the mean surrogate over rollouts and actions."""
        count = len(rollouts) * len(self.actions)
        loss_sum, deviation = 0.0, 0.0
        self.optimizer.zero_grad()
        for start in range(0, len(rollouts), self.context.micro_batch):
            part = rollouts[start : start + self.context.micro_batch]
            requests = [r.request for r in part]
            for i, step in enumerate(self.actions):
                state = torch.stack([r.states[i] for r in part])
                action = torch.stack([r.actions[i] for r in part])
                old = torch.stack([r.log_probabilities[i] for r in part])
                advantage = advantages[start : start + len(part)].to(old)
                new = self.log_policy(state, action, step, requests)
                loss = -self.surrogate(new, old, advantage).sum() / count
                loss.backward()
                loss_sum += loss.item()
                deviation += (new.detach() - old).exp().sub(1).abs().sum().item() / count
        return {"loss": loss_sum, "gradient_norm": self.optimizer.step(), "ratio_deviation": deviation}

    def planned_cost(self) -> CostRange:
        """T forward steps to sample, A with gradient to learn from the A actions."""
        pictures = self.config.rollout_size
        rows = pictures * (1 if self.sampler.guidance == 1.0 else 2)
        trained = rows * len(self.actions)
        cost = Cost(
            forward_rows=rows * len(self.steps),
            gradient_rows=trained,
            backward_rows=trained,
            decodes=pictures,
            queries=pictures,
        )
        return CostRange(cost, cost)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and reward statistics."""
        return {"optimizer": self.optimizer.state_dict(), "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore optimiser and reward statistics."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state_dict(state["statistics"])
