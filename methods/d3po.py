"""D3PO: direct preferences between the actions of two trajectories (Yang et al., CVPR 2024).

    sample two trajectories of each prompt c with noise at every step; w, l = larger and smaller reward
    rho_t = p_theta(x_{t-1} | x_t, c) / p_ref(x_{t-1} | x_t, c), clamped to [1 - e, 1 + e];  ref: without the adapter
    loss = -sum_t log sigmoid( beta * log rho_t^w - beta * log rho_t^l )

Cost of an iteration of B pictures: T steps forward to sample, A <= T forward for the reference, A with gradient, B
queries without gradient. A collection serves several optimiser steps, each on its share of the pairs.
Differs from the authors' code in: rewards rank the pairs there as well, but several pairs share an optimiser step; the
mean over the steps instead of their sum, which AdamW does not see. log p is the mean over latent dimensions, as there:
the clamp is on that scale. An action whose ratio is clamped teaches nothing, nor does a pair of equal rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from harness.api import BASE, Adapter, Context, CostRange, DiffusionModel, Request, Reward, UserError
from methods._candidates import Pair, candidate, ranked_pairs
from methods._rollouts import Rollout, RolloutConfig, RolloutTuner
from methods._state import OptimizerState


class D3POConfig(RolloutConfig):
    """D3PO's settings."""

    beta: float = Field(0.1, gt=0, description="Factor on the log-ratios. The authors' code: 0.1.")
    clamp: float = Field(0.1, gt=0, lt=1, description="e: ratios are clamped to 1 - e .. 1 + e. Authors' code: 0.1.")
    shared_start: bool = Field(True, description="Both pictures of a pair start from the same x_T. Authors' code: yes.")


class D3PO(OptimizerState, RolloutTuner[D3POConfig]):
    """D3PO: per-step preferences between two noisy trajectories of each prompt."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = D3POConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: D3POConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        if config.rollout_size % (2 * config.updates_per_rollout):
            raise UserError(
                f"d3po.rollout_size={config.rollout_size} must be a multiple of 2 * updates_per_rollout="
                f"{2 * config.updates_per_rollout}, so that every update sees whole pairs"
            )

    @property
    def requests_per_iteration(self) -> int:
        """One for each pair."""
        return self.config.rollout_size // 2

    def rival(self, request: Request) -> Request:
        """The second picture of the pair: other noise in every step, and another x_T unless that is shared."""
        other = candidate(request, 1, self.model, self.context.randomness)
        return replace(other, noise=request.noise) if self.config.shared_start else other

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """Collect pairs, then pass over them once in `updates_per_rollout` optimiser steps."""
        rollouts, rewards = self.collect_all([r for first in requests for r in (first, self.rival(first))])
        reference = self.reference(rollouts)
        pairs = ranked_pairs(rewards.view(-1, 2))
        order = self.context.randomness.permutation(len(pairs), "order", requests[0].noise_id)
        size = len(pairs) // self.config.updates_per_rollout
        updates = [
            self.update([pairs[i] for i in order[start : start + size]], rollouts, reference)
            for start in range(0, len(pairs), size)
        ]
        loss, norm = torch.tensor(updates, dtype=torch.float64).mean(0).tolist()
        return {"reward": rewards.mean().item(), "loss": loss, "gradient_norm": norm}

    @torch.no_grad()
    def reference(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Log-probabilities (N, A) of all actions without the adapter."""
        size = self.context.micro_batch
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        return torch.cat([torch.stack([self.log_actions(p, i, BASE) for i in self.places], 1) for p in parts])

    @property
    def places(self) -> range:
        """Of the actions in a rollout."""
        return range(len(self.actions))

    def log_actions(self, rollouts: Sequence[Rollout], place: int, adapter: Adapter) -> Tensor:
        """Log-probability (B,) of one action of each rollout."""
        state = torch.stack([r.states[place] for r in rollouts])
        action = torch.stack([r.actions[place] for r in rollouts])
        return self.log_policy(state, action, self.actions[place], [r.request for r in rollouts], adapter)

    def loss(self, log_ratio_winner: Tensor, log_ratio_loser: Tensor) -> Tensor:
        """-log sigmoid of beta times the difference of the clamped log-ratios, (B,)."""
        low, high = math.log(1 - self.config.clamp), math.log(1 + self.config.clamp)
        preference = log_ratio_winner.clamp(low, high) - log_ratio_loser.clamp(low, high)
        return -functional.logsigmoid(self.config.beta * preference)

    def update(self, pairs: Sequence[Pair], rollouts: Sequence[Rollout], reference: Tensor) -> tuple[float, float]:
        """One optimiser step on the mean loss over pairs and actions; loss and gradient norm."""
        total = 0.0
        self.optimizer.zero_grad()
        for start in range(0, len(pairs), self.context.micro_batch):
            part = pairs[start : start + self.context.micro_batch]
            rows = [p.winner for p in part] + [p.loser for p in part]
            weights = reference.new_tensor([p.weight for p in part]) / (len(pairs) * len(self.actions))
            for i in self.places:
                now = self.log_actions([rollouts[row] for row in rows], i, Adapter())
                loss = (weights * self.loss(*(now - reference[rows, i]).chunk(2))).sum()
                loss.backward()
                total += loss.item()
        return total, self.optimizer.step()

    def planned_cost(self) -> CostRange:
        """Sampling, the reference's word on every action, and learning from every action once."""
        return self.cost(reference_steps=len(self.actions))
