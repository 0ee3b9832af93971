"""DRaFT+: DRaFT-K with a penalty for leaving the base model (NVIDIA's NeMo-Aligner, 2024).

    loss = -r(x_0, c) + beta * mean over the last K steps of mean((eps_theta(x_t) - eps_ref(x_t))^2),   eps_ref constant

The penalty is the KL divergence between the two models' steps up to a factor that depends on the step. Both noises
are guided; no gradient flows through eps_ref. beta = 0 is DRaFT-K.
Cost of an update of B pictures: T steps forward, K of them backward, K more forward with the base, B queries.
Differs from NeMo-Aligner in: pictures are not clamped before the reward, which sees the end of the chain (there the
last step's x0_hat: the same with a clean final target); no annealed guidance at generation.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from harness.api import BASE, Context, CostRange, DiffusionModel, Randomness, Reward
from harness.sampling import Step
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class DraftPlusConfig(RewardGradientConfig):
    """DRaFT+'s settings."""

    k: int = Field(1, ge=1, description="Steps with gradient and penalty, K. NeMo-Aligner (truncation_steps): 1.")
    beta: float = Field(
        0.2, ge=0, description="Weight of the penalty. NeMo-Aligner: 1 unless set; its recipes 0.2 (SD), 0.1 (SDXL)."
    )


class DraftPlus(RewardGradientTuner[DraftPlusConfig]):
    """DRaFT+: DRaFT-K with a KL penalty to the base model."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = DraftPlusConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: DraftPlusConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.require_steps("draft-plus.k", config.k)

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x_0) plus the penalty of the last K steps."""
        penalties: list[Tensor] = []

        def penalise(step: Step, x: Tensor, noise: Tensor) -> None:
            if self.config.beta > 0 and step.index >= len(self.steps) - self.config.k:
                with torch.no_grad():
                    reference = self.predict(x, step.t, batch, adapter=BASE).noise
                penalties.append((noise - reference).square().flatten(1).mean(1))

        reward = self.score(self.chain(batch, gradient_steps=self.config.k, observe_noise=penalise), batch)
        loss = -reward
        if penalties:
            loss = loss + self.config.beta * torch.stack(penalties).mean(0)
        return Objective(loss=loss, reward=reward)

    def planned_cost(self) -> CostRange:
        """K steps carry gradient; the base repeats them without."""
        reference = self.chain_cost(0, self.config.k if self.config.beta > 0 else 0)
        cost = self.truncated_cost(self.config.k).expected + reference
        return CostRange(cost, cost)
