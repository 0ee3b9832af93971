"""FreeDoM: after each step the latent moves up the reward of the one-step prediction (Yu et al., ICCV 2023).

    for t = T..1:
        g = grad_{x_t} r(decode(x0_hat(x_t)), c)                 # through decoder and denoiser
        x_{t-1} = step(x_t) + rho * g,   rho = s * w * rms(eps_c - eps_u) / rms(g)
        optionally noise x_{t-1} back to x_t and repeat (time travel)

w is the scale of classifier-free guidance. Cost of a picture: A guided steps with gradient, forward and backward, T - A
without, A decodes and queries. s = 0 is the base sampler.
Differs from the paper in: the sampler is the run's (its code takes ancestral steps); the step size is measured picture
by picture, so that it does not depend on the batch; at w = 1, where the rule is empty, rms(eps) stands in.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from harness.api import Cost, Prediction
from harness.sampling import Step
from methods._guidance import GuidedTuner, Scene, WindowedConfig


class FreeDoMConfig(WindowedConfig):
    """FreeDoM's settings."""

    scale: float = Field(0.2, ge=0, description="s, the step in units of what guidance does. FreeDoM's code: 0.2.")


class FreeDoM(GuidedTuner[FreeDoMConfig]):
    """FreeDoM: latents move up the reward's gradient after the step, by a measured length."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = FreeDoMConfig

    def guided(self, scene: Scene, step: Step, x_t: Tensor) -> Prediction:
        """x_{t-1} + rho*g is the step from the clean latent x0 + rho/alpha_{t-1}*g with the same noise."""
        prediction, gradient = self.gradient_at(scene, step, x_t)
        moved = self.config.scale / step.alpha_next * self.measured(scene, step, prediction, gradient)
        return replace(prediction, x0=prediction.x0 + moved)

    def guided_cost(self, rows: int) -> Cost:
        """The same as universal guidance: a pass with gradient, one backward, a reward and its gradient."""
        scoring = Cost(decodes=1, queries=1, reward_gradients=1)
        return scoring + Cost(gradient_rows=rows, backward_rows=rows)
