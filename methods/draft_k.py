"""DRaFT-K: backpropagate the reward through the last K sampling steps only (Clark et al., ICLR 2024, Algorithm 1).

    x_K <- stop_grad(x_K) before the last K steps; otherwise as DRaFT. K = T is DRaFT.

Cost of an update of B pictures: T steps forward, K of them backward, B queries.
Differs from the paper in: nothing that the paper states.
"""

from __future__ import annotations

from pydantic import Field

from harness.api import Context, CostRange, DiffusionModel, Randomness, Reward
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class DraftKConfig(RewardGradientConfig):
    """DRaFT-K's settings."""

    k: int = Field(1, ge=1, description="Steps with gradient, K. The paper finds small K best per update.")


class DraftK(RewardGradientTuner[DraftKConfig]):
    """DRaFT-K: the reward's gradient through the last K sampling steps."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = DraftKConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: DraftKConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.require_steps("draft-k.k", config.k)

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0), x_0 differentiable in the last K steps."""
        reward = self.score(self.chain(batch, gradient_steps=self.config.k), batch)
        return Objective(loss=-reward, reward=reward)

    def planned_cost(self) -> CostRange:
        """K steps carry gradient."""
        return self.truncated_cost(self.config.k)
