"""DDPO-SF: the score-function policy gradient of denoising (Black et al., ICLR 2024, section 4.3).

    grad J = E[ sum_t grad log p_theta(x_{t-1} | x_t, c) * A(x_0, c) ]

Cost of an iteration of B pictures: T steps forward to sample, A <= T with gradient to learn, B queries without
gradient. On-policy: one optimiser step per rollout.
Differs from the paper in: LoRA instead of all weights, as in the authors' later code; the mean over the steps
instead of their sum, which AdamW does not see.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from methods._policy_gradient import PerPromptConfig, PerPromptTuner


class DDPOSFConfig(PerPromptConfig):
    """DDPO-SF's settings."""

    updates_per_rollout: int = Field(1, ge=1, le=1, description="The estimator is on-policy: one step per rollout.")


class DDPOSF(PerPromptTuner[DDPOSFConfig]):
    """DDPO-SF: score-function policy gradient with per-prompt advantages."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = DDPOSFConfig

    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """A * log p: its gradient is the score function's."""
        return advantage * log_probability
