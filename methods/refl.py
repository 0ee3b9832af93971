"""ReFL: the reward of a one-step prediction from a random late step (Xu et al., NeurIPS 2023; DRaFT's Algorithm 1).

    t ~ U{1..m};  run the chain without gradient to x_t;  theta <- theta + eta * grad_theta r(x0_hat(x_t), c)

Cost of an update of B pictures: T - t steps forward, one with gradient, B queries.
Differs from ReFL's released code in: guidance is used in training and the adapter is a LoRA (as in DRaFT's
comparison); no pre-training loss. With m = 1 and a clean final target it is DRaFT-1.
"""

from __future__ import annotations

from pydantic import Field

from harness.api import Adapter, Context, Cost, CostRange, DiffusionModel, Randomness, Reward, UserError
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class ReFLConfig(RewardGradientConfig):
    """ReFL's settings."""

    m: int = Field(20, ge=1, description="t is drawn from the last m steps. DRaFT's comparison: 20 of 50.")
    hinge: float | None = Field(
        None, description="Loss relu(hinge - r) instead of -r: no gradient above it. ReFL's code: 2 (ImageReward)."
    )


class ReFL(RewardGradientTuner[ReFLConfig]):
    """ReFL: the reward's gradient through a one-step prediction from a random late step."""

    version = "1"
    stochastic = True
    needs_reward_gradient = True
    Config = ReFLConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: ReFLConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        if config.m > len(self.steps):
            raise UserError(f"refl.m={config.m} exceeds the sampler's {len(self.steps)} steps; lower m")

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x0_hat(x_t)), or relu(hinge - r), at one t for the whole update."""
        remaining = 1 + draws.integer("t", below=self.config.m)
        step = self.steps[-remaining]
        x_t = self.chain(batch, gradient_steps=0, stop=step.index)
        prediction = self.model.predict(
            x_t, step.t, batch.condition, guidance=self.context.sampler.guidance, adapter=Adapter()
        )
        reward = self.score(prediction.x0, batch)
        loss = -reward if self.config.hinge is None else (self.config.hinge - reward).relu()
        return Objective(loss=loss, reward=reward)

    def planned_cost(self) -> CostRange:
        """T - t forward steps: on average T - (m+1)/2, at most T - 1; one step carries gradient, not checkpointed."""
        one_step = self.config.batch_size * self.rows_per_picture
        gradient = Cost(gradient_rows=one_step, backward_rows=one_step) + self.scoring_cost()
        T = len(self.steps)
        expected = self.chain_cost(0, 1) * (T - (self.config.m + 1) / 2) + gradient
        return CostRange(expected, self.chain_cost(0, 1) * (T - 1) + gradient)
