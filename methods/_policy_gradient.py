"""What the policy-gradient family shares: per-prompt advantages, and an update on a surrogate of the actions.

Methods of the family differ in the surrogate that they maximise (Black et al., ICLR 2024).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from harness.api import Context, CostRange, DiffusionModel, Request, Reward
from methods._rollouts import Rollout, RolloutConfig, RolloutTuner


class PolicyGradientConfig(RolloutConfig):
    """Settings of the whole family."""

    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to this range. DDPO's code: 5.")
    per_prompt_buffer: int = Field(32, ge=1, description="Rewards remembered per prompt. DDPO's code: 16 or 32.")
    per_prompt_minimum: int = Field(
        16, ge=2, description="Below this count the rollout's own mean and deviation are used. DDPO's code: 16."
    )


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


class PolicyGradientTuner(RolloutTuner[ConfigT], Generic[ConfigT]):
    """Sample trajectories, turn rewards into advantages, ascend a surrogate. Subclasses give the surrogate."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: ConfigT, context: Context) -> None:
        super().__init__(model, reward, config, context)
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
        rollouts, rewards = self.collect_all(requests)
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
        """Sampling, and learning from every action once."""
        return self.cost()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and reward statistics."""
        return {"optimizer": self.optimizer.state_dict(), "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore optimiser and reward statistics."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state_dict(state["statistics"])
