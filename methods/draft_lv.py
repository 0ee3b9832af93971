"""DRaFT-LV: DRaFT-1 with a gradient of lower variance (Clark et al., ICLR 2024, Algorithm 1).

    g = grad r(x_0)                                              # the last step only, as DRaFT-1
    for i = 1..n:  x_1 = alpha_1 * stop_grad(x_0) + sigma_1 * eps_i,   g += grad r(x0_hat(x_1))

Cost of an update of B pictures: T steps forward, 1 + n backward, (1 + n) * B queries.
What the literature leaves open is an option: `keep_base` (the paper's algorithm as later restated keeps the first
term; the first author's own later code drops it), `reduction` (sum there, mean elsewhere; under AdamW only clipping
and weight decay see the difference), `level` (the timestep of x_1: the last of the sampler, a given one, or a random
one), `reencode` (re-noise x_0, or what the encoder makes of its picture).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.api import Context, Cost, CostRange, DiffusionModel, Randomness, Reward, UserError
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class DraftLVConfig(RewardGradientConfig):
    """DRaFT-LV's settings."""

    n: int = Field(2, ge=1, description="Inner loops. The paper's table: 2.")
    keep_base: bool = Field(True, description="Keep DRaFT-1's own term; otherwise only the n re-noised ones count.")
    reduction: Literal["sum", "mean"] = Field("sum", description="How the terms are combined. Restated paper: sum.")
    level: int | tuple[int, int] | None = Field(
        None,
        description="Timestep of x_1, or the first and last of those it is drawn from in each loop (the first author's "
        "later code: 30 to 300); None: the sampler's last one (sigma_1).",
    )
    reencode: bool = Field(False, description="Re-noise encode(decode(x_0)), as the first author's later code does.")


class DraftLV(RewardGradientTuner[DraftLVConfig]):
    """DRaFT-LV: DRaFT-1 plus n re-noised and re-denoised copies of each picture."""

    version = "1"
    stochastic = True
    needs_reward_gradient = True
    Config = DraftLVConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: DraftLVConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        level = self.steps[-1].t if config.level is None else config.level
        self.low, self.high = level if isinstance(level, tuple) else (level, level)
        least = 1 if model.prediction_type == "flow" else 0  # the timestep 0 of a flow model is the clean latent
        if not least <= self.low <= self.high <= model.training_timesteps - 1 + least:
            limit = f"{least} <= first <= last <= {model.training_timesteps - 1 + least}"
            raise UserError(f"draft-lv.level={config.level} is no timestep or range of them; keep to {limit}")
        self.terms = config.n + (1 if config.keep_base else 0)

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """The sum (or mean) of -r over the base term and the n re-denoised copies."""
        x_0 = self.chain(batch, gradient_steps=1 if self.config.keep_base else 0)
        rewards = [self.score(x_0, batch)] if self.config.keep_base else []
        clean = x_0.detach()
        if self.config.reencode:
            with torch.no_grad():
                clean = self.model.encode(self.model.decode(clean)).to(clean)
        for i in range(self.config.n):
            level = self.low + draws.integer("level", i, below=int(self.high - self.low) + 1)
            noisy = self.model.noised(clean, level, self.fresh_noise(batch, i))
            rewards.append(self.score(self.predict(noisy, level, batch).x0, batch))
        total = torch.stack(rewards).sum(0)
        loss = -total if self.config.reduction == "sum" else -total / self.terms
        return Objective(loss=loss, reward=rewards[0])

    def fresh_noise(self, batch: Batch, i: int) -> Tensor:
        """Noise of the i-th inner loop, keyed by the requests."""
        rows = [
            self.context.randomness.normal(self.model.latent_shape, "renoise", r.prompt.id, r.noise_id, i)
            for r in batch.requests
        ]
        return torch.stack(rows).to(batch.noise)

    def planned_cost(self) -> CostRange:
        """One step of the chain and n single steps carry gradient; the inner steps are never checkpointed."""
        base_steps = 1 if self.config.keep_base else 0
        inner = len(self.steps) - base_steps
        rows = self.config.batch_size * self.rows_per_picture * self.config.n
        cost = self.chain_cost(base_steps, inner) + Cost(gradient_rows=rows, backward_rows=rows)
        cost = cost + self.scoring_cost(self.terms)
        if self.config.reencode:
            cost = cost + Cost(decodes=self.config.batch_size)
        return CostRange(cost, cost)
