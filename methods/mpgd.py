"""MPGD: the predicted clean latent itself moves up the reward (He et al., ICLR 2024, without a manifold projection).

    for t = T..1:
        x0 = x0_hat(x_t)                                         # no gradient through the denoiser
        g = grad_{x0} r(decode(x0), c)
        x0 = x0 + rho * g,   rho = s * w * rms(eps_c - eps_u) / rms(g)
        x_{t-1} = alpha_{t-1} * x0 + the same noise as before

w is the scale of classifier-free guidance. Cost of a picture: T steps forward, none backward; A guided steps with a
decode, a query and a gradient of the reward. s = 0 is the base sampler.
Differs from the released code in: the step is the sampler's, with the predicted noise unchanged, where the code takes
ancestral steps, which pass on only a few hundredths of the shift and therefore use s = 15 to 30; the step size is
measured picture by picture; at w = 1, where the rule is empty, rms(eps) stands in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from harness.api import Cost, Prediction
from harness.sampling import Step
from methods._guidance import GuidedTuner, Scene, WindowedConfig


class MPGDConfig(WindowedConfig):
    """MPGD's settings."""

    scale: float = Field(
        0.5, ge=0, description="s. This project's choice; MPGD's code: 15, for a step that passes on little of it."
    )


class MPGD(GuidedTuner[MPGDConfig]):
    """MPGD: the one-step prediction moves up the reward's gradient; the denoiser is not differentiated."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = MPGDConfig

    def guided(self, scene: Scene, step: Step, x_t: Tensor) -> Prediction:
        """The same noise, another clean latent."""
        with torch.no_grad():
            prediction = self.predict(scene, step, x_t)
        with torch.enable_grad():
            x0 = prediction.x0.detach().requires_grad_()
            gradient = self.reward_gradient(scene, x0, x0)
        moved = self.config.scale * self.measured(scene, step, prediction, gradient)
        return replace(prediction, x0=prediction.x0 + moved)

    def guided_cost(self, rows: int) -> Cost:
        """One pass without gradient; the reward is differentiated."""
        return Cost(forward_rows=rows, decodes=1, queries=1, reward_gradients=1)
