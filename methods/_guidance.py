"""What guidance at generation time shares: the chain of the base model, its prediction pushed up the reward.

At each guided step the reward of the decoded one-step prediction x0_hat(x_t) is differentiated, and the prediction is
changed before the step is taken. Methods of the family differ in what the gradient is taken with respect to and in
what they change. With self-recurrence a step is taken, its result noised back to its own level, and taken again.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from harness.api import (
    BASE,
    Conditioning,
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Diverged,
    Generation,
    InferenceConfig,
    InferenceFineTuner,
    Prediction,
    Randomness,
    Request,
    Reward,
    SamplerConfig,
    UserError,
)
from harness.sampling import Predict, Step, generate, step_noise, transition


class GuidanceConfig(InferenceConfig):
    """Settings of the whole family."""

    recurrences: int = Field(
        1,
        ge=1,
        description="How often each guided step is taken; above 1 it is noised back in between. Universal Guidance: "
        "2 to 10 by task; FreeDoM: 1 to 3. 1 keeps scale 0 the base sampler.",
    )
    begin: float = Field(0.0, ge=0, lt=1, description="Guide the steps from this fraction of the chain on.")
    end: float = Field(1.0, gt=0, le=1, description="Guide the steps before this fraction of the chain.")


class WindowedConfig(GuidanceConfig):
    """Settings of the methods whose step is measured against classifier-free guidance."""

    begin: float = Field(0.3, ge=0, lt=1, description="As in the base class. FreeDoM's and MPGD's code: 0.3.")
    end: float = Field(0.7, gt=0, le=1, description="As in the base class. FreeDoM's and MPGD's code: 0.7.")


@dataclass(frozen=True)
class Scene:
    """Requests that are in memory together, the encoded prompts, and the scale of classifier-free guidance."""

    requests: Sequence[Request]
    condition: Conditioning
    guidance: float


ConfigT = TypeVar("ConfigT", bound=GuidanceConfig)


class GuidedTuner(InferenceFineTuner, Generic[ConfigT]):
    """Generate with the base model and guided predictions. Subclasses guide one, in `guided`."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: ConfigT, context: Context) -> None:
        self.model, self.reward, self.config, self.context = model, reward, config, context
        self.window(context.sampler)

    @abstractmethod
    def guided(self, scene: Scene, step: Step, x_t: Tensor) -> Prediction:
        """The prediction at x_t, without a graph, after guidance by the reward."""

    @abstractmethod
    def guided_cost(self, rows: int) -> Cost:
        """Of one guided prediction of one picture, which takes `rows` denoiser rows."""

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """The chain of the base model with guided predictions."""
        base = replace(generation, lora_scale=0.0)
        parts = [generate(self.model, p, base, self.predictor(p, base)) for p in self.context.micro_batches(requests)]
        return torch.cat(parts)

    def predictor(self, requests: Sequence[Request], generation: Generation) -> Predict:
        """What the sampling loop asks at each step."""
        condition = self.model.condition([request.prompt.text for request in requests])
        scene = Scene(requests, condition, generation.sampler.guidance)
        window = self.window(generation.sampler)

        def predict(step: Step, x_t: Tensor) -> Prediction:
            if step.index not in window:
                return self.predict(scene, step, x_t)
            prediction = self.guided(scene, step, x_t)
            for again in range(1, self.config.recurrences):
                x_t = self.noised_back(scene, step, prediction, again)
                prediction = self.guided(scene, step, x_t)
            return prediction

        return predict

    def window(self, sampler: SamplerConfig) -> range:
        """Indices of the guided steps.

        Raises:
            UserError: There is none.
        """
        inside = [i for i in range(sampler.steps) if self.config.begin <= i / sampler.steps < self.config.end]
        if not inside:
            raise UserError(
                f"no step of {sampler.steps} lies between begin={self.config.begin} and end={self.config.end}; "
                "widen the window or raise sampler.steps"
            )
        return range(inside[0], inside[-1] + 1)

    def predict(self, scene: Scene, step: Step, x_t: Tensor) -> Prediction:
        """What the base model says."""
        return self.model.predict(x_t, step.t, scene.condition, guidance=scene.guidance, adapter=BASE)

    def noised_back(self, scene: Scene, step: Step, prediction: Prediction, again: int) -> Tensor:
        """x_t = a*x_{t-1} + sqrt(sigma^2 - (a*sigma_next)^2)*noise with a = alpha/alpha_next (Universal Guidance).

        The noise of a stochastic step is in the same draw. As in an evaluation, noise is keyed by the requests alone.
        """
        policy, ratio = transition(prediction, step), step.alpha / step.alpha_next
        variance = step.sigma**2 - ratio**2 * (step.sigma_next**2 - policy.std**2)
        draws = Randomness(0, "evaluation", again)
        noise = step_noise(self.model, scene.requests, draws, "recurrence")(step)
        return ratio * policy.mean + math.sqrt(max(0.0, variance)) * noise

    def gradient_at(self, scene: Scene, step: Step, x_t: Tensor) -> tuple[Prediction, Tensor]:
        """The base model's prediction at x_t, and grad_{x_t} r(decode(x0_hat(x_t))), through the denoiser."""
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            prediction = self.predict(scene, step, x_t)
            gradient = self.reward_gradient(scene, prediction.x0, x_t)
        parts = (prediction.noise, prediction.x0, prediction.conditional, prediction.unconditional)
        return Prediction(*(part.detach() for part in parts)), gradient

    def reward_gradient(self, scene: Scene, x0: Tensor, variable: Tensor) -> Tensor:
        """Gradient of the rewards of the decoded x0, each with respect to its own row of `variable`."""
        rewards = self.reward(self.model.decode(x0), [request.prompt for request in scene.requests])
        (gradient,) = torch.autograd.grad(rewards.sum(), variable)
        if not (rewards.isfinite().all() and gradient.isfinite().all()):
            raise Diverged("the reward of a one-step prediction, or its gradient, is not finite")
        return gradient

    def measured(self, scene: Scene, step: Step, prediction: Prediction, gradient: Tensor) -> Tensor:
        """The gradient scaled, picture by picture, to guidance * rms(noise_conditional - noise_unconditional).

        Without an unconditional branch there is no such difference; rms(noise) stands in.
        """
        if self.model.rows_per_latent(scene.guidance) == 1:
            size = rms(prediction.noise)
        else:
            alpha, sigma = step.alpha, step.sigma  # what turns the network's output into noise
            factor = {"epsilon": 1.0, "v_prediction": alpha, "sample": -alpha / sigma, "flow": alpha}
            difference = prediction.conditional - prediction.unconditional
            size = scene.guidance * abs(factor[self.model.prediction_type]) * rms(difference)
        return gradient * (size / rms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny))

    def planned_cost(self) -> CostRange:
        """Of one picture: T steps, of which the guided ones are taken `recurrences` times."""
        sampler = self.context.sampler
        rows, window = self.model.rows_per_latent(sampler.guidance), len(self.window(sampler))
        cost = Cost(forward_rows=rows * (sampler.steps - window))
        cost = cost + self.guided_cost(rows) * (window * self.config.recurrences)
        return CostRange(cost, cost)


def rms(x_BCHW: Tensor) -> Tensor:
    """Root of the mean square of each row, (B, 1, 1, 1)."""
    return x_BCHW.square().mean((1, 2, 3), keepdim=True).sqrt()
