"""What the reward-gradient family shares: one update by gradient ascent on a differentiable reward.

DRaFT (Clark et al. 2024, Algorithm 1) and its relatives run the same chain; they differ in where the gradient is
stopped and in which picture the reward sees. A method of the family is its `objective`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from harness.api import (
    Adapter,
    Conditioning,
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Diverged,
    MethodConfig,
    Prediction,
    Randomness,
    Request,
    Reward,
    UserError,
)
from harness.sampling import initial_latents, sample, schedule, step_noise
from methods._state import OptimizerState


class RewardGradientConfig(MethodConfig):
    """Settings of the whole family."""

    batch_size: int = Field(4, ge=1, description="Pictures per update. DRaFT, small scale: 4; large scale: 16.")


@dataclass(frozen=True)
class Batch:
    """Requests that are in memory together, with x_T (B, C, H, W) and the encoded prompts."""

    requests: Sequence[Request]
    noise: Tensor
    condition: Conditioning


@dataclass(frozen=True)
class Objective:
    """What a method minimises, (B,), and the rewards of the pictures that it made, (B,)."""

    loss: Tensor
    reward: Tensor


ConfigT = TypeVar("ConfigT", bound=RewardGradientConfig)


class RewardGradientTuner(OptimizerState, Generic[ConfigT]):
    """Ascend the gradient of the reward of generated pictures. Subclasses say how, in `objective`."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: ConfigT, context: Context) -> None:
        self.model, self.reward, self.config, self.context = model, reward, config, context
        self.sampler = context.sampler
        self.steps = schedule(model, self.sampler)
        self.optimizer = context.optimizer(list(model.adapter_parameters().values()), config.optimizer)

    @abstractmethod
    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """Loss and reward of each row. `draws` is the iteration's randomness, the same for all its batches."""

    @property
    def requests_per_iteration(self) -> int:
        """One batch."""
        return self.config.batch_size

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """One update: the mean loss over the requests, its gradient, one step of the optimiser."""
        draws = self.context.randomness.child("iteration", requests[0].noise_id)
        losses, rewards = [], []
        self.optimizer.zero_grad()
        for part in self.context.micro_batches(requests):
            texts = [request.prompt.text for request in part]
            batch = Batch(part, initial_latents(self.model, part), self.model.condition(texts))
            objective = self.objective(batch, draws)
            (objective.loss.sum() / len(requests)).backward()
            losses.append(objective.loss.detach())
            rewards.append(objective.reward.detach())
        reward = torch.cat(rewards).mean().item()
        if not math.isfinite(reward):
            raise Diverged(f"the reward of the training pictures is {reward}")
        norm = self.optimizer.step()
        return {"reward": reward, "loss": torch.cat(losses).mean().item(), "gradient_norm": norm}

    def chain(self, batch: Batch, gradient_steps: int, kept: int | None = None, **options: Any) -> Tensor:
        """Latents after the chain, with the gradient through its last `gradient_steps` steps.

        Args:
            batch: What to sample.
            gradient_steps: The window of the gradient.
            kept: How many steps' activations the backward pass needs; None: those of the window.
            options: Of `harness.sampling.sample`.
        """
        return sample(
            self.model,
            batch.noise,
            batch.condition,
            self.sampler,
            gradient_steps=gradient_steps,
            checkpointing=self.checkpointed(gradient_steps if kept is None else kept),
            noise=step_noise(self.model, batch.requests, self.context.randomness, "step"),
            **options,
        )

    def predict(self, x: Tensor, t: float, batch: Batch, **options: Any) -> Prediction:
        """The guided prediction with the adapter on, unless `options` of `DiffusionModel.predict` say otherwise."""
        settings = {"guidance": self.sampler.guidance, "adapter": Adapter(), **options}
        return self.model.predict(x, t, batch.condition, **settings)

    def score(self, latents: Tensor, batch: Batch) -> Tensor:
        """Reward of the decoded latents, (B,). The gradient flows through the decoder; nothing is clamped."""
        return self.reward(self.model.decode(latents), [request.prompt for request in batch.requests])

    @property
    def rows_per_picture(self) -> int:
        """Denoiser rows of one prediction: two with classifier-free guidance."""
        return self.model.rows_per_latent(self.sampler.guidance)

    def require_steps(self, setting: str, count: int) -> None:
        """Refuse a setting that asks for more steps than the chain has."""
        if count > len(self.steps):
            raise UserError(
                f"{setting}={count} exceeds the sampler's {len(self.steps)} steps; lower it or raise sampler.steps"
            )

    def checkpointed(self, gradient_steps: int) -> bool:
        """Whether chains are checkpointed: one decision by the largest batch, so that the cost is known beforehand."""
        in_memory = min(self.config.batch_size, self.context.micro_batch) * self.rows_per_picture
        return self.context.checkpointing(gradient_steps, in_memory)

    def chain_cost(self, gradient_steps: int, forward_steps: int) -> Cost:
        """Denoiser rows of one iteration's chains."""
        pictures = self.config.batch_size
        rows = pictures * self.rows_per_picture
        return Cost(
            forward_rows=rows * forward_steps,
            gradient_rows=rows * gradient_steps,
            recomputed_rows=rows * gradient_steps if self.checkpointed(gradient_steps) else 0,
            backward_rows=rows * gradient_steps,
        )

    def scoring_cost(self, pictures_per_request: int = 1) -> Cost:
        """Decodes, queries and reward gradients of one iteration."""
        pictures = self.config.batch_size * pictures_per_request
        return Cost(decodes=pictures, queries=pictures, reward_gradients=pictures)

    def truncated_cost(self, gradient_steps: int) -> CostRange:
        """Cost of an iteration that scores the end of a chain with its last `gradient_steps` steps differentiated."""
        cost = self.chain_cost(gradient_steps, len(self.steps) - gradient_steps) + self.scoring_cost()
        return CostRange(cost, cost)

    @staticmethod
    def range_of(costs: Sequence[Cost], weights: Sequence[float]) -> CostRange:
        """Cost of an iteration that is costs[i] with a probability proportional to weights[i]."""
        expected = sum((c * w for c, w in zip(costs, weights, strict=True)), Cost()) * (1 / sum(weights))
        return CostRange(expected, Cost(*map(max, zip(*map(astuple, costs), strict=True))))
