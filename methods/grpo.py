"""GRPO: each picture against the others of its own prompt (Shao et al. 2024; on images Flow-GRPO and DanceGRPO, 2025).

    for each prompt c:  x_0^1..x_0^G ~ p_old(. | c),   A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)
    J = E[ sum_t min( rho_t * A_i,  clip(rho_t, 1 - e, 1 + e) * A_i )  -  beta * KL(p_theta || p_base at x_t) ]

A request of the seed's stream becomes a group: its first picture starts from the request's own latent, the others from
latents that its ids give. An iteration of B pictures reads B / G requests.
Cost of an iteration of B pictures: T steps forward to sample, A <= T with gradient to learn (and A of the base without
where beta > 0), B queries without gradient.
Differs from DanceGRPO in: LoRA instead of all weights; every step is learnt from; a group's pictures start from
latents of their own (implementations offer one latent per group, too); the group's standard deviation is the
population's. beta is Flow-GRPO's; DanceGRPO has no KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from harness.api import Context, DiffusionModel, Reward, UserError
from methods._policy_gradient import Advantages, PolicyGradientTuner, clipped_surrogate, standardised
from methods._rollouts import Rollout, RolloutConfig


class GRPOConfig(RolloutConfig):
    """GRPO's settings."""

    group_size: int = Field(
        8, ge=1, description="Pictures per prompt, G. DanceGRPO: 16, Flow-GRPO: 24; 8 makes 4 groups of 32 pictures."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clipped to this range. DanceGRPO: 5.")
    clip_range: float = Field(1e-4, gt=0, description="e in clip(rho, 1-e, 1+e). DanceGRPO and Flow-GRPO: 1e-4.")
    kl_weight: float = Field(0.0, ge=0, description="beta. DanceGRPO: none; Flow-GRPO: 0.04 or 0.01 (PickScore).")


class GroupAdvantages(Advantages):
    """Rewards standardised within consecutive groups; nothing is remembered."""

    def __init__(self, group_size: int, clip: float) -> None:
        self.group_size, self.clip = group_size, clip

    def of(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """One clipped advantage per picture, (N, 1)."""
        groups = rewards.view(-1, self.group_size)
        return standardised(groups, groups).clamp(-self.clip, self.clip).view(-1, 1)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class GRPO(PolicyGradientTuner[GRPOConfig]):
    """GRPO: clipped policy gradient with advantages relative to a group of pictures of the same prompt."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = GRPOConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: GRPOConfig, context: Context) -> None:
        size = config.group_size
        if size == 1:
            raise UserError("grpo.group_size=1: a picture alone has no advantage over its group; give 2 or more")
        if config.rollout_size % size:
            raise UserError(f"grpo.rollout_size={config.rollout_size} must be a multiple of group_size={size}")
        statistics = GroupAdvantages(size, config.advantage_clip)
        super().__init__(model, reward, config, context, statistics, group_size=size, kl_weight=config.kl_weight)

    def surrogate(self, log_probability: Tensor, old_log_probability: Tensor, advantage: Tensor) -> Tensor:
        """DDPO's, on the group's advantage."""
        return clipped_surrogate(log_probability, old_log_probability, advantage, self.config.clip_range)
