"""DPOK: policy gradient on the reward, held to the base by the KL of each step (Fan et al., NeurIPS 2023, Algorithm 1).

    J = E[ sum_t  w * clip(rho_t, 1 - e, 1 + e) * A_t  -  beta * KL(p_theta || p_base at x_t) ]
    A_t = r(x_0, c) - V(x_t, t, c);   V <- V - grad E[ (r - V)^2 ],   several steps per rollout

The KL of two Gaussians of one std is |mean - mean_base|^2 / (2 std^2). With the reward in its own unit the optimum
tilts the base's trajectories by exp(w/beta * r).
Cost of an iteration of B pictures: T steps forward to sample, A <= T with gradient to learn and A of the base without
(none where beta is 0), B queries without gradient.
Differs from the authors' code in: the KL is the Gaussians' own, not the plain squared difference of the predicted
noises; the mean reward of the other pictures is subtracted, too, which keeps the gradient unbiased and makes the
reward's offset harmless; V and the policy learn from the current rollout alone, V after its values were used, not
from a buffer. As there, a later KL's dependence on earlier actions is left out, and clipping holds on both sides.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from harness.api import Context, DiffusionModel, Reward, UserError
from methods._policy_gradient import Advantages, PolicyGradientTuner
from methods._rollouts import RolloutConfig
from methods._value_baseline import RewardBaseline, ValueBaseline


class DPOKConfig(RolloutConfig):
    """DPOK's settings."""

    reward_weight: float = Field(10.0, gt=0, description="w. DPOK: 10 for one prompt, 1000 for many.")
    kl_weight: float = Field(0.01, ge=0, description="beta; 0 leaves the policy free. DPOK: 0.01 (0.1 as well).")
    clip_range: float = Field(1e-4, gt=0, description="e in clip(rho, 1-e, 1+e). DPOK's code: 1e-4.")
    value_baseline: bool = Field(True, description="Subtract a learnt V(x_t, t, c). DPOK's code: on.")
    value_width: int = Field(256, ge=1, description="Width of V's three hidden layers. DPOK's code: 256.")
    value_learning_rate: float = Field(1e-4, gt=0, description="Of V, AdamW without decay. DPOK's code: 1e-4.")
    value_steps: int = Field(5, ge=1, description="Gradient steps on V per rollout. DPOK's code: 5.")


class DPOK(PolicyGradientTuner[DPOKConfig]):
    """DPOK: policy gradient on the reward with a value baseline, regularised by the KL divergence from the base."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = DPOKConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: DPOKConfig, context: Context) -> None:
        if config.rollout_size == 1:
            raise UserError("dpok.rollout_size=1: the baseline needs other pictures; give 2 or more")
        baseline: Advantages = RewardBaseline()
        if config.value_baseline:
            baseline = ValueBaseline(model, context, config.value_width, config.value_learning_rate, config.value_steps)
        super().__init__(model, reward, config, context, baseline, kl_weight=config.kl_weight)

    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """The weighted advantage times the clipped ratio."""
        ratio = torch.exp(log_probability - old_log_probability)
        clipped = ratio.clamp(1 - self.config.clip_range, 1 + self.config.clip_range)
        return self.config.reward_weight * advantage * clipped
