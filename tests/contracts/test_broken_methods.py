"""The contracts see what they are for: methods that are broken in one place, and the contract that must fail."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ConfigDict
from torch import Tensor

from harness.api import (
    Adapter,
    Context,
    CostRange,
    DiffusionModel,
    FineTuner,
    Generation,
    Prompt,
    Randomness,
    Request,
    Reward,
)
from harness.contracts.check import contracts_of, verify
from harness.contracts.lab import Subject
from harness.sampling import sample, transition
from methods._likelihood import Lesson, Picture
from methods._policy_gradient import Advantages
from methods._reward_gradient import Batch, Objective, RewardGradientConfig
from methods._rollouts import Rollout
from methods.best_of_n import BestOfN
from methods.d3po import D3PO
from methods.ddpo import DDPO
from methods.dpo import DPO
from methods.draft import Draft
from methods.draft_k import DraftK
from methods.grpo import GRPO
from methods.raft import RAFT
from methods.rwr import RWR


class DetachedDecoder(Draft):
    """The decoder sees latents without their history; the loss keeps a graph that carries nothing."""

    def score(self, latents: Tensor, batch: Batch) -> Tensor:
        """Scores without a gradient, and a zero with one."""
        return super().score(latents.detach(), batch) + 0 * latents.flatten(1).sum(1)


class SignFlip(DraftK):
    """Descends the reward."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """+r instead of -r."""
        right = super().objective(batch, draws)
        return Objective(loss=-right.loss, reward=right.reward)


class NoStopGradient(DraftK):
    """Forgets to stop the gradient before the last K steps."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """The whole chain differentiated."""
        reward = self.score(self.chain(batch, gradient_steps=len(self.steps)), batch)
        return Objective(loss=-reward, reward=reward)


class Holes(Draft):
    """Cuts the prediction of a step in the middle of the window out of the graph."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0), with one step's noise detached."""
        x, guidance = batch.noise, self.context.sampler.guidance
        for step in self.steps:
            predicted = self.model.predict(x, step.t, batch.condition, guidance=guidance, adapter=Adapter())
            if step.index == 2:
                noise = predicted.noise.detach()
                predicted = replace(predicted, noise=noise, x0=(x - step.sigma * noise) / step.alpha)
            x = transition(predicted, step).mean
        reward = self.score(x, batch)
        return Objective(loss=-reward, reward=reward)


class FrozenStep(Draft):
    """Freezes the adapter at a step in the middle of the window, and lets the gradient run on to earlier steps."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0), with frozen values of the adapter at one step."""
        frozen = Adapter(parameters={name: p.detach() for name, p in self.model.adapter_parameters().items()})
        x = self.chain(batch, len(self.steps), adapter=lambda step: frozen if step.index == 2 else Adapter())
        reward = self.score(x, batch)
        return Objective(loss=-reward, reward=reward)


class StepNoiseByRow(DraftK):
    """Noise of a stochastic sampler's steps belongs to rows of what is in memory."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0)."""
        shape, randomness = batch.noise.shape, self.context.randomness
        x = sample(
            self.model,
            batch.noise,
            batch.condition,
            self.sampler,
            gradient_steps=self.config.k,
            noise=lambda step: randomness.normal(shape, "step", step.index).to(batch.noise),
        )
        reward = self.score(x, batch)
        return Objective(loss=-reward, reward=reward)


class EqualWeights(RWR):
    """Forgets the rewards when it weighs pictures."""

    def weights(self, rewards_GK: Tensor) -> Tensor:
        """The same for all."""
        return torch.full_like(rewards_GK, 1 / rewards_GK.numel())


class LearnsTheWorst(RAFT):
    """Keeps the picture of each prompt that scores least."""

    def weights(self, rewards_GK: Tensor) -> Tensor:
        """Of the rewards turned round."""
        return super().weights(-rewards_GK)


class PrefersTheLoser(DPO):
    """Turns each preference round."""

    def lessons(self, pictures: Sequence[Picture], rewards_GK: Tensor) -> list[Lesson]:
        """Loser first."""
        return [replace(lesson, pictures=lesson.pictures[::-1]) for lesson in super().lessons(pictures, rewards_GK)]


class PrefersTheLosersActions(D3PO):
    """Turns each preference round."""

    def loss(self, log_ratio_winner: Tensor, log_ratio_loser: Tensor) -> Tensor:
        """Loser first."""
        return super().loss(log_ratio_loser, log_ratio_winner)


class LossNoiseByRow(RWR):
    """Noise that pictures are learnt under belongs to rows of what is in memory."""

    def loss(self, lessons: Sequence[Lesson], t: int, noise: Tensor) -> Tensor:
        """The denoising loss under other noise."""
        return super().loss(lessons, t, self.context.randomness.normal(noise.shape, "loss", t).to(noise))


class ForgottenWeights(RWR):
    """Weighs by an average of rewards over iterations that is not in its state."""

    average = 0.0

    def weights(self, rewards_GK: Tensor) -> Tensor:
        """Smaller, the further the rewards are from their average."""
        self.average = 0.5 * self.average + 0.5 * rewards_GK.mean().item()
        return super().weights(rewards_GK) * abs(self.average)


class Uncentred(Advantages):
    """Rewards in standard deviations of their group, from 0 on."""

    def of(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """Clipped to 5, as GRPO's."""
        return (rewards / (rewards.std() + 1e-6)).clamp(-5, 5)[:, None]

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class UncentredAdvantages(GRPO):
    """Has no baseline."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: Any, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.statistics = Uncentred()


class ForgottenTracker(DDPO):
    """Keeps the statistics of rewards out of its state."""

    def state_dict(self) -> dict[str, Any]:
        """The optimiser alone."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The optimiser alone."""
        self.optimizer.load_state_dict(state["optimizer"])


class ClampedPictures(Draft):
    """Clamps pictures before they are scored."""

    def score(self, latents: Tensor, batch: Batch) -> Tensor:
        """Of pictures in [0, 1]."""
        return self.reward(self.model.decode(latents).clamp(0, 1), [request.prompt for request in batch.requests])


class IntegerAdvantages(DDPO):
    """Stores advantages as integers."""

    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """With the fraction cut off."""
        return super().surrogate(log_probability, old_log_probability, advantage.trunc())


class GlobalNoise(Draft):
    """Draws from torch's global generator."""

    def score(self, latents: Tensor, batch: Batch) -> Tensor:
        """Of pictures with a little noise."""
        return super().score(latents + 1e-3 * torch.randn(latents.shape), batch)


class ForeignPrompts(Draft):
    """Scores pictures for a prompt that it was not given."""

    def score(self, latents: Tensor, batch: Batch) -> Tensor:
        """As if all had shown a griffin."""
        return self.reward(self.model.decode(latents), [Prompt("griffin", "a griffin")] * len(latents))


class HalfTheCost(Draft):
    """Plans half of what it spends."""

    def planned_cost(self) -> CostRange:
        """Too little."""
        half = super().planned_cost().maximal * 0.5
        return CostRange(half, half)


class MeanOfParts(Draft):
    """Divides by the size of the part that is in memory, not by that of the batch."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """A sum over parts of their means."""
        right = super().objective(batch, draws)
        return Objective(loss=right.loss * self.config.batch_size / len(batch.requests), reward=right.reward)


class SwallowedNaN(Draft):
    """Takes what is not a number for zero."""

    def score(self, latents: Tensor, batch: Batch) -> Tensor:
        """Always finite."""
        return super().score(latents, batch).nan_to_num(0.0, 0.0, 0.0)


class Undeclared(Draft):
    """Says that it needs no gradient of the reward."""

    needs_reward_gradient = False


class NoChance(Draft):
    """Says that it draws something."""

    stochastic = True


class Unseeded(Draft):
    """Draws from the operating system."""

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """Weighted by chance."""
        right = super().objective(batch, draws)
        return Objective(loss=right.loss * (1 + os.urandom(1)[0]), reward=right.reward)


class LaxConfig(RewardGradientConfig):
    """Takes any setting."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Lax(Draft):
    """A misspelt setting goes unnoticed."""

    Config = LaxConfig


class KeepsTheWorst(BestOfN):
    """Keeps the picture that scores least."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: Any, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.reward = lambda images, prompts: -reward(images, prompts)  # type: ignore[assignment]


class KeyedByRow(BestOfN):
    """Noise belongs to rows of the batch."""

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """What is generated, a little off by row."""
        latents = super().generate(requests, generation)
        return latents + 1e-3 * self.context.randomness.normal(latents.shape, "noise").to(latents)


class MovesTheAdapter(BestOfN):
    """Changes the adapter while it generates."""

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """After a small step of every parameter."""
        for parameter in self.model.adapter_parameters().values():
            parameter.data += 1e-3
        return super().generate(requests, generation)


class ForgetsTheOthers(BestOfN):
    """Plans one candidate of its sixteen."""

    def planned_cost(self) -> CostRange:
        """Of one chain."""
        one = super().planned_cost().maximal * (1 / self.config.n)
        return CostRange(one, one)


class KeepsTheGraph(BestOfN):
    """Returns latents that ask for a gradient."""

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """With a graph to come."""
        return super().generate(requests, generation).requires_grad_()


CASES: list[tuple[type[FineTuner], str, str]] = [
    (DetachedDecoder, "gradient-declared", "differentiated for 0 pictures"),
    (DetachedDecoder, "adapter-only", "do not move"),
    (SignFlip, "improves", "of the way"),
    (NoStopGradient, "costs", "gradient_rows"),
    (Holes, "costs", "backward_rows"),
    (FrozenStep, "no-holes", "past frozen values"),
    (StepNoiseByRow, "micro-batch", r"in parts of 3 .*eta 1"),
    (EqualWeights, "improves", "of the way"),
    (LearnsTheWorst, "improves", "of the way"),
    (PrefersTheLoser, "improves", "of the way"),
    (PrefersTheLosersActions, "improves", "of the way"),
    (LossNoiseByRow, "micro-batch", "in parts of"),
    (ForgottenWeights, "resumes", "a run goes on differently"),
    (UncentredAdvantages, "improves", "of the way"),
    (ForgottenTracker, "resumes", "a run goes on differently"),
    (ClampedPictures, "unclamped", r"lie in \[0, 1\]"),
    (IntegerAdvantages, "adapter-only", "do not move"),
    (GlobalNoise, "global-random", "torch.randn draws from a global generator"),
    (ForeignPrompts, "own-prompts", "griffin"),
    (ForeignPrompts, "held-out", "griffin"),
    (HalfTheCost, "costs", "planned"),
    (HalfTheCost, "budget", "iterations on a budget"),
    (MeanOfParts, "micro-batch", "in parts of 3"),
    (SwallowedNaN, "diverges", "went unnoticed"),
    (Undeclared, "gradient-declared", "needs_reward_gradient is False"),
    (NoChance, "stochastic", "results are the same"),
    (Unseeded, "same-seed", "differ"),
    (Lax, "settings", "is accepted"),
    (KeepsTheWorst, "improves", "the base sampler's"),
    (KeyedByRow, "batch", "one by one"),
    (MovesTheAdapter, "weights-unchanged", "the adapter has changed"),
    (ForgetsTheOthers, "costs", "planned"),
    (KeepsTheGraph, "latents", "keep a graph"),
]


@pytest.mark.parametrize(("broken", "contract", "why"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_the_matching_contract_fails(
    broken: type[FineTuner], contract: str, why: str, gaussian: DiffusionModel, tiny_model: DiffusionModel
) -> None:
    """It fails, and for the reason that it is there for."""
    (checked,) = [c for c in contracts_of(broken) if c.name == contract]
    outcome = verify(checked, Subject(f"{__file__}:{broken.__name__}", broken, gaussian, tiny_model))
    assert outcome.state == "FAILED"
    assert re.search(why, outcome.why), outcome.why
