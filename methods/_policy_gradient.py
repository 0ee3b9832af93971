"""What the policy-gradient family shares: an update that weighs the actions of a rollout by their advantages.

Methods of the family differ in the advantages, in the surrogate that they maximise (Black et al., ICLR 2024), and in
whether the policy is held to the base model by the KL divergence of each step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from harness.api import BASE, Context, CostRange, DiffusionModel, Request, Reward
from harness.sampling import Transition, log_probability
from methods._candidates import candidate
from methods._rollouts import Rollout, RolloutConfig, RolloutTuner


class PerPromptConfig(RolloutConfig):
    """Settings of methods whose advantages are relative to each prompt's own past."""

    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to this range. DDPO's code: 5.")
    per_prompt_buffer: int = Field(32, ge=1, description="Rewards remembered per prompt. DDPO's code: 16 or 32.")
    per_prompt_minimum: int = Field(
        16, ge=2, description="Below this count the rollout's own mean and deviation are used. DDPO's code: 16."
    )


def standardised(rewards: Tensor, pool: Tensor) -> Tensor:
    """(rewards - mean) / (std + 1e-6) with mean and standard deviation of the last dimension of `pool`."""
    return (rewards - pool.mean(-1, keepdim=True)) / (pool.std(-1, correction=0, keepdim=True) + 1e-6)


def clipped_surrogate(log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor, e: float) -> Tensor:
    """The smaller of the plain and the clipped importance-weighted advantage: min(rho*A, clip(rho, 1-e, 1+e)*A)."""
    ratio = torch.exp(log_probability - old_log_probability)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - e, 1 + e) * advantage)


def gaussian_kl(policy: Transition, base: Transition) -> Tensor:
    """KL(policy || base) of two steps with one std, (mean - mean_base)^2 / (2 std^2), MEAN over dimensions (B,).

    The mean, as `log_probability`: reward and KL then keep the proportion that they have for whole latents.
    """
    return ((policy.mean - base.mean) ** 2 / (2 * policy.std**2)).flatten(1).mean(1)


class Advantages(ABC):
    """Turns the rewards of a rollout into the weights of its actions, and keeps what it needs for that."""

    @abstractmethod
    def of(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """Weights (N, A) of the actions, or (N, 1) where those of a picture share one; then learns from the rewards."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the next weights depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class PromptStatistics(Advantages):
    """Running mean and standard deviation of rewards per prompt (Black et al. 2024, section 4 and its code).

    Args:
        buffer: How many rewards are remembered per prompt.
        minimum: Prompts with fewer rewards fall back on the statistics of the current rollout.
        clip: Advantages are clipped to this range.
    """

    def __init__(self, buffer: int, minimum: int, clip: float = math.inf) -> None:
        self.buffer, self.minimum, self.clip = buffer, minimum, clip
        self.rewards: dict[str, deque[float]] = {}

    def of(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """One clipped advantage per picture, (N, 1)."""
        return self.advantages([r.request.prompt.id for r in rollouts], rewards).clamp(-self.clip, self.clip)[:, None]

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """(reward - mean) / (std + 1e-6), (B,), after adding these rewards to the buffers."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        values = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            seen = self.rewards[prompt]
            pool = torch.tensor(seen, dtype=rewards.dtype) if len(seen) >= self.minimum else rewards
            values.append(standardised(reward, pool))
        return torch.cat(values)

    def state_dict(self) -> dict[str, Any]:
        """The buffers."""
        return {prompt: list(seen) for prompt, seen in self.rewards.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the buffers."""
        self.rewards = {prompt: deque(seen, maxlen=self.buffer) for prompt, seen in state.items()}


ConfigT = TypeVar("ConfigT", bound=RolloutConfig)


class PolicyGradientTuner(RolloutTuner[ConfigT], Generic[ConfigT]):
    """Sample trajectories, turn rewards into advantages, ascend a surrogate. Subclasses give the surrogate.

    Args:
        model: As for every method.
        reward: As for every method.
        config: The method's settings.
        context: As for every method.
        statistics: Turns rewards into advantages.
        group_size: Pictures that each request becomes: itself, and others of its prompt with noise of their own.
        kl_weight: Weight of each step's KL divergence from the base model.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        config: ConfigT,
        context: Context,
        statistics: Advantages,
        *,
        group_size: int = 1,
        kl_weight: float = 0.0,
    ) -> None:
        super().__init__(model, reward, config, context)
        self.statistics, self.group_size, self.kl_weight = statistics, group_size, kl_weight

    @abstractmethod
    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """What one action contributes to the objective that is maximised; all (B,)."""

    @property
    def requests_per_iteration(self) -> int:
        """One for each group of a rollout."""
        return self.config.rollout_size // self.group_size

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """Collect a rollout, then pass over it once in `updates_per_rollout` optimiser steps."""
        rollouts, rewards = self.collect_all([picture for request in requests for picture in self.group(request)])
        advantages = self.statistics.of(rollouts, rewards)
        order = self.context.randomness.permutation(len(rollouts), "order", requests[0].noise_id)
        size = len(rollouts) // self.config.updates_per_rollout
        metrics: dict[str, list[float]] = {}
        for start in range(0, len(rollouts), size):
            chosen = order[start : start + size]
            for name, value in self.update([rollouts[i] for i in chosen], advantages[chosen]).items():
                metrics.setdefault(name, []).append(value)
        return {"reward": rewards.mean().item(), **{name: sum(v) / len(v) for name, v in metrics.items()}}

    def group(self, request: Request) -> list[Request]:
        """The request itself, then the others of its group, whose ids and initial latents its own ids give."""
        draws = self.context.randomness
        return [candidate(request, member, self.model, draws, "group") for member in range(self.group_size)]

    def update(self, rollouts: Sequence[Rollout], advantages: Tensor) -> dict[str, float]:
        """One optimiser step on the mean surrogate over rollouts and actions, less the weighted KL."""
        count = len(rollouts) * len(self.actions)
        weights = advantages.expand(-1, len(self.actions))
        loss_sum, deviation, divergence = 0.0, 0.0, 0.0
        self.optimizer.zero_grad()
        for start in range(0, len(rollouts), self.context.micro_batch):
            part = rollouts[start : start + self.context.micro_batch]
            requests = [r.request for r in part]
            for i, step in enumerate(self.actions):
                state = torch.stack([r.states[i] for r in part])
                action = torch.stack([r.actions[i] for r in part])
                old = torch.stack([r.log_probabilities[i] for r in part])
                policy = self.policy(state, step, requests)
                new = log_probability(action, policy)
                value = self.surrogate(new, old, weights[start : start + len(part), i].to(old))
                if self.kl_weight > 0:
                    with torch.no_grad():
                        base = self.policy(state, step, requests, BASE)
                    kl = gaussian_kl(policy, base)
                    divergence += kl.sum().item() / count
                    value = value - self.kl_weight * kl
                loss = -value.sum() / count
                loss.backward()
                loss_sum += loss.item()
                deviation += (new.detach() - old).exp().sub(1).abs().sum().item() / count
        found = {"loss": loss_sum, "gradient_norm": self.optimizer.step(), "ratio_deviation": deviation}
        return found | ({"kl": divergence} if self.kl_weight > 0 else {})

    def planned_cost(self) -> CostRange:
        """Sampling, learning from every action once, and what the base would have done there where it is asked."""
        return self.cost(reference_steps=len(self.actions) if self.kl_weight > 0 else 0)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and reward statistics."""
        return {"optimizer": self.optimizer.state_dict(), "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore optimiser and reward statistics."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state_dict(state["statistics"])


PerPromptT = TypeVar("PerPromptT", bound=PerPromptConfig)


class PerPromptTuner(PolicyGradientTuner[PerPromptT], Generic[PerPromptT]):
    """A policy gradient whose advantages are relative to each prompt's own past, as DDPO's."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: PerPromptT, context: Context) -> None:
        statistics = PromptStatistics(config.per_prompt_buffer, config.per_prompt_minimum, config.advantage_clip)
        super().__init__(model, reward, config, context, statistics)
