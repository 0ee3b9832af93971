"""DDPO-IS: the policy gradient of denoising with importance sampling and clipping (Black et al., ICLR 2024, 4.3).

    J = E[ sum_t min( rho_t * A,  clip(rho_t, 1 - e, 1 + e) * A ) ],   rho_t = p_theta(x_{t-1}|x_t,c) / p_old(...)

Cost of an iteration of B pictures: T steps forward to sample, A <= T with gradient to learn, B queries without
gradient. The rollout serves several optimiser steps; at the first of them rho is 1.
Differs from the paper in: LoRA instead of all weights, as in the authors' later code; the mean over the steps
instead of their sum, which AdamW does not see. log p is the mean over latent dimensions, as there: the clipping
range is on that scale.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from methods._policy_gradient import PerPromptConfig, PerPromptTuner, clipped_surrogate


class DDPOConfig(PerPromptConfig):
    """DDPO-IS's settings."""

    clip_range: float = Field(1e-4, gt=0, description="e in clip(rho, 1-e, 1+e). DDPO's code: 1e-4.")


class DDPO(PerPromptTuner[DDPOConfig]):
    """DDPO (importance sampling): clipped policy gradient with per-prompt advantages."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = DDPOConfig

    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """The smaller of the plain and the clipped importance-weighted advantage."""
        return clipped_surrogate(log_probability, old_log_probability, advantage, self.config.clip_range)
