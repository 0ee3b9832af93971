"""DRaFT: backpropagate the reward through the whole sampling chain (Clark et al., ICLR 2024, Algorithm 1).

    x_0 = sample(theta, c, x_T),  theta <- theta + eta * grad_theta r(x_0, c)

Cost of an update of B pictures: T steps forward and T backward (and T again where checkpointed), B queries.
Differs from the paper in: nothing that the paper states; the learning rate's schedule (constant here) is not stated.
"""

from __future__ import annotations

from harness.api import CostRange, Randomness
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class Draft(RewardGradientTuner[RewardGradientConfig]):
    """DRaFT: the reward's gradient through all T sampling steps."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = RewardGradientConfig

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0), x_0 differentiable in every step."""
        reward = self.score(self.chain(batch, gradient_steps=len(self.steps)), batch)
        return Objective(loss=-reward, reward=reward)

    def planned_cost(self) -> CostRange:
        """All steps carry gradient."""
        return self.truncated_cost(len(self.steps))
