"""What likelihood methods share: collect pictures, keep what the reward likes, lower its denoising loss.

    loss(x_0; t, noise) = mean over dimensions of (output_theta(alpha_t*x_0 + sigma_t*noise, t, c) - target)^2

in the denoiser's own parametrisation: the target is the noise, x_0, alpha*noise - sigma*x_0 (v) or noise - x_0 (flow).
An iteration collects once and then takes `epochs` optimiser steps, each a pass over everything kept, with a fresh t
and noise for every lesson.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

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
    Randomness,
    Request,
    Reward,
    UserError,
)
from harness.sampling import initial_latents, sample, schedule, step_noise
from methods._candidates import candidate
from methods._state import OptimizerState


class LikelihoodConfig(MethodConfig):
    """Settings of the whole family."""

    rollout_size: int = Field(32, ge=1, description="Pictures collected per iteration. DDPO's code for RWR: 10240.")
    candidates: int = Field(4, ge=1, description="Pictures of each prompt, K; must divide rollout_size.")
    epochs: int = Field(5, ge=1, description="Passes (optimiser steps) per collection. DDPO's code for RWR: 5.")
    timesteps: Literal["sampler", "all"] = Field(
        "sampler", description="t is drawn from the steps that sampling visits, or from all, as in the sources."
    )
    guided_loss: bool = Field(
        True, description="The loss is of the guided prediction, both branches trained. DDPO's code for RWR: yes."
    )


@dataclass(frozen=True)
class Picture:
    """What was collected: a request and its latent x_0 (C, H, W)."""

    request: Request
    latent: Tensor


@dataclass(frozen=True)
class Lesson:
    """Pictures of one prompt that share t and noise, and what their loss counts; weights sum to 1 or less."""

    pictures: tuple[Picture, ...]
    weight: float


def loss_target(model: DiffusionModel, x0: Tensor, t: float, noise: Tensor) -> Tensor:
    """What a perfect denoiser would answer to alpha*x0 + sigma*noise if it knew the noise."""
    alpha, sigma = model.alpha_sigma(t)
    match model.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x0
        case "v_prediction":
            return alpha * noise - sigma * x0
        case "flow":
            return noise - x0


ConfigT = TypeVar("ConfigT", bound=LikelihoodConfig)


class LikelihoodTuner(OptimizerState, Generic[ConfigT]):
    """Collect pictures, turn them into lessons by their rewards, learn these. Subclasses say what a lesson is."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: ConfigT, context: Context) -> None:
        if config.rollout_size % config.candidates:
            raise UserError(
                f"rollout_size={config.rollout_size} must be a multiple of candidates={config.candidates}, "
                "the pictures of one prompt"
            )
        self.model, self.reward, self.config, self.context = model, reward, config, context
        self.levels = [step.t for step in schedule(model, context.sampler)]
        self.guidance = context.sampler.guidance if config.guided_loss else 1.0
        self.optimizer = context.optimizer(list(model.adapter_parameters().values()), config.optimizer)

    @abstractmethod
    def lessons(self, pictures: Sequence[Picture], rewards_GK: Tensor) -> list[Lesson]:
        """What is learnt from G prompts with K pictures each; picture k of prompt g has place g*K + k."""

    @abstractmethod
    def loss(self, lessons: Sequence[Lesson], t: float, noise: Tensor) -> Tensor:
        """Loss of each lesson (B,), not weighted, at timestep t with this noise (B, C, H, W)."""

    @property
    def requests_per_iteration(self) -> int:
        """One for each prompt of a collection."""
        return self.config.rollout_size // self.config.candidates

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """One collection, then `epochs` optimiser steps."""
        draws = self.context.randomness.child("iteration", requests[0].noise_id)
        K = self.config.candidates
        asked = [candidate(r, k, self.model, self.context.randomness) for r in requests for k in range(K)]
        pictures, rewards = self.collect(asked)
        lessons = self.lessons(pictures, rewards.view(-1, K))
        updates = [self.update(lessons, draws.child("epoch", epoch)) for epoch in range(self.config.epochs)]
        loss, norm = torch.tensor(updates, dtype=torch.float64).mean(0).tolist()
        return {"reward": rewards.mean().item(), "loss": loss, "gradient_norm": norm}

    @torch.no_grad()
    def collect(self, requests: Sequence[Request]) -> tuple[list[Picture], Tensor]:
        """Pictures of the current adapter by the run's sampler, and their rewards (B,) in double precision.

        Raises:
            Diverged: A reward is not finite.
        """
        pictures, rewards = [], []
        for part in self.context.micro_batches(requests):
            latents = sample(
                self.model,
                initial_latents(self.model, part),
                self.model.condition([r.prompt.text for r in part]),
                self.context.sampler,
                noise=step_noise(self.model, part, self.context.randomness, "collection"),
            )
            pictures += [Picture(r, latent) for r, latent in zip(part, latents, strict=True)]
            rewards.append(self.reward(self.model.decode(latents), [r.prompt for r in part]).double().cpu())
        if not torch.cat(rewards).isfinite().all():
            raise Diverged("a reward of the collection is not finite")
        return pictures, torch.cat(rewards)

    def update(self, lessons: Sequence[Lesson], draws: Randomness) -> tuple[float, float]:
        """One optimiser step on the weighted loss of all lessons, each at its own t; loss and gradient norm."""
        groups: dict[float, list[Lesson]] = {}
        for lesson in lessons:
            groups.setdefault(self.timestep(lesson, draws), []).append(lesson)
        total = 0.0
        self.optimizer.zero_grad()
        for t, group in sorted(groups.items()):
            for start in range(0, len(group), self.context.micro_batch):
                part = group[start : start + self.context.micro_batch]
                noise = torch.stack([draws.normal(self.model.latent_shape, "noise", *self.key(x)) for x in part])
                losses = self.loss(part, t, noise.to(self.model.device, self.model.dtype))
                loss = (losses * losses.new_tensor([lesson.weight for lesson in part])).sum()
                loss.backward()
                total += loss.item()
        return total, self.optimizer.step()

    def timestep(self, lesson: Lesson, draws: Randomness) -> float:
        """The lesson's t: one that sampling visits, or any of training."""
        key = ("t", *self.key(lesson))
        if self.config.timesteps == "all":
            return self.model.draw_timestep(draws, *key)
        return self.levels[draws.integer(*key, below=len(self.levels))]

    def key(self, lesson: Lesson) -> tuple[str, int]:
        """What the lesson's t and noise are keyed by: the ids of its first picture."""
        request = lesson.pictures[0].request
        return request.prompt.id, request.noise_id

    def error(self, pictures: Sequence[Picture], t: float, noise: Tensor, adapter: Adapter) -> Tensor:
        """Denoising loss of each picture (B,)."""
        x0 = torch.stack([picture.latent for picture in pictures])
        condition = self.model.condition([picture.request.prompt.text for picture in pictures])
        noisy = self.model.noised(x0, t, noise)
        prediction = self.model.predict(noisy, t, condition, guidance=self.guidance, adapter=adapter)
        output = prediction.unconditional + self.guidance * (prediction.conditional - prediction.unconditional)
        return (output - loss_target(self.model, x0, t, noise)).pow(2).flatten(1).mean(1)

    def cost(self, learnt: int, reference: int = 0) -> CostRange:
        """A collection, and in each epoch a pass over `learnt` pictures and over `reference` without gradient."""
        pictures, epochs = self.config.rollout_size, self.config.epochs
        rows = self.model.rows_per_latent(self.guidance)
        sampling = self.model.rows_per_latent(self.context.sampler.guidance) * self.context.sampler.steps
        cost = Cost(
            forward_rows=pictures * sampling + epochs * reference * rows,
            gradient_rows=epochs * learnt * rows,
            backward_rows=epochs * learnt * rows,
            decodes=pictures,
            queries=pictures,
        )
        return CostRange(cost, cost)


class WeightedLikelihoodTuner(LikelihoodTuner[ConfigT], Generic[ConfigT]):
    """Fine-tune on the collected pictures, each with a weight. Subclasses give the weights."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """How many pictures of a collection are learnt."""

    @abstractmethod
    def weights(self, rewards_GK: Tensor) -> Tensor:
        """Weights of all pictures (G, K), which sum to 1; those that are not kept have 0."""

    def lessons(self, pictures: Sequence[Picture], rewards_GK: Tensor) -> list[Lesson]:
        """The `kept` pictures of largest weight, one by one, in the order of the collection."""
        weights = self.weights(rewards_GK).flatten()
        kept = weights.argsort(descending=True, stable=True)[: self.kept].sort().values.tolist()
        return [Lesson((pictures[i],), weights[i].item()) for i in kept]

    def loss(self, lessons: Sequence[Lesson], t: float, noise: Tensor) -> Tensor:
        """The denoising loss."""
        return self.error([lesson.pictures[0] for lesson in lessons], t, noise, Adapter())

    def planned_cost(self) -> CostRange:
        """A collection, and `epochs` passes over what is kept."""
        return self.cost(self.kept)
