"""Universal guidance: the reward's gradient at the one-step prediction steers the noise (Bansal et al. 2023).

    for t = T..1:
        for i = 1..k:
            g = grad_{x_t} r(decode(x0_hat(x_t)), c)             # through decoder and denoiser
            eps = eps_theta(x_t) - s * sigma_t * g               # x0_hat follows from it
            x_{t-1} = step(x_t, eps)
            if i < k:  x_t = (alpha_t/alpha_{t-1}) * x_{t-1} + noise of the rest of the level

Cost of a picture: k*T steps with gradient, forward and backward, and as many decodes and queries. s = 0 with k = 1 is
the base sampler. Differs from the paper in: the loss is minus the reward; x0_hat and eps stay consistent, as they are
in any step of this sampler; no backward guidance (the inner optimisation of x0_hat).
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from harness.api import Context, Cost, DiffusionModel, Prediction, Reward, UserError
from harness.sampling import Step, schedule
from methods._guidance import GuidanceConfig, GuidedTuner, Scene


class UniversalGuidanceConfig(GuidanceConfig):
    """Universal guidance's settings."""

    scale: float = Field(
        6.0, ge=0, description="s; depends on the reward's unit. Universal Guidance: 6 (style) to 20000 (face)."
    )


class UniversalGuidance(GuidedTuner[UniversalGuidanceConfig]):
    """Universal guidance: the noise prediction moves down the reward's gradient at the one-step prediction."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = UniversalGuidanceConfig

    def __init__(
        self, model: DiffusionModel, reward: Reward, config: UniversalGuidanceConfig, context: Context
    ) -> None:
        super().__init__(model, reward, config, context)
        if config.begin == 0 and schedule(model, context.sampler)[0].alpha == 0:
            raise UserError(
                f"guidance does not fit the first step on {model.name}: what it starts from is pure noise (alpha 0), "
                "and no change of the noise gives another clean latent there; set guidance.begin, for example to 0.1"
            )

    def guided(self, scene: Scene, step: Step, x_t: Tensor) -> Prediction:
        """The noise less s*sigma*g, and the clean latent that goes with it: x0 + s*sigma^2/alpha*g."""
        prediction, gradient = self.gradient_at(scene, step, x_t)
        shift = self.config.scale * step.sigma * gradient
        x0 = prediction.x0 + step.sigma / step.alpha * shift
        return replace(prediction, noise=prediction.noise - shift, x0=x0)

    def guided_cost(self, rows: int) -> Cost:
        """One pass with gradient and one backward."""
        return Cost(gradient_rows=rows, backward_rows=rows, decodes=1, queries=1, reward_gradients=1)
