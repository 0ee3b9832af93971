"""Baselines of a policy gradient: the other pictures' rewards, and a learnt value of the state that was acted in.

Both leave the gradient unbiased: the weight of a picture's action is its reward less something that does not depend on
that action, namely other pictures, and a network that has not learnt from this rollout yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.api import Context, DiffusionModel, OptimizerConfig
from methods._policy_gradient import Advantages
from methods._rollouts import Rollout


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each row less the mean of the other rows."""
    return (rewards - rewards.mean(0)) * (len(rewards) / (len(rewards) - 1))


class RewardBaseline(Advantages):
    """The reward less the mean reward of the rollout's other pictures; nothing is remembered."""

    def of(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """One advantage per picture, (N, 1), in the reward's own unit."""
        return leave_one_out(rewards)[:, None]

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class ValueBaseline(Advantages):
    """The same of what a network V(x_t, t, c) does not foretell: three layers, each scaled by the step (as DPOK's).

    V is 0 at first and learns differences from the rollout's mean reward; the other pictures give the rest.

    Args:
        model: Gives shapes, device, precision and encoded prompts.
        context: Gives initial values and the optimiser.
        width: Of the hidden layers.
        learning_rate: Of V.
        fits: Gradient steps on V per rollout.
    """

    def __init__(self, model: DiffusionModel, context: Context, width: int, learning_rate: float, fits: int) -> None:
        self.model, self.context, self.fits = model, context, fits
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        latent = model.latent_shape[0] * model.latent_shape[1] * model.latent_shape[2]
        inputs = [latent + self._text([""]).shape[1], width, width]
        self.layers: dict[str, nn.Parameter] = {}
        for i, size in enumerate(inputs):
            weight = context.randomness.normal((width, size), "value", i) * (2 / size) ** 0.5
            self._add(f"weight {i}", weight)
            self._add(f"bias {i}", torch.zeros(width))
            self._add(f"gain {i}", torch.ones(context.sampler.steps, width))
        self._add("weight out", torch.zeros(width))
        config = OptimizerConfig(learning_rate=learning_rate, weight_decay=0.0, max_gradient_norm=None)
        self.optimizer = context.optimizer(list(self.layers.values()), config)

    def _add(self, name: str, value: Tensor) -> None:
        self.layers[name] = nn.Parameter(value.to(self.model.device, self.dtype))

    def _text(self, texts: Sequence[str]) -> Tensor:
        """The encoded prompts, (N, F): the mean over tokens of each of the conditioning's tensors."""
        tensors = self.model.condition(texts).tensors.values()
        return torch.cat([t.to(self.dtype).reshape(len(t), -1, t.shape[-1]).mean(1) for t in tensors], 1)

    def values(self, rollouts: Sequence[Rollout]) -> Tensor:
        """V in every state that was acted in, (N, A)."""
        states = torch.stack([r.states for r in rollouts]).to(self.dtype).flatten(2)
        text = self._text([r.request.prompt.text for r in rollouts])
        hidden = torch.cat([states, text[:, None].expand(-1, states.shape[1], -1)], 2)
        for i in range(3):
            affine = hidden @ self.layers[f"weight {i}"].T + self.layers[f"bias {i}"]
            hidden = (self.layers[f"gain {i}"][: states.shape[1]] * affine).relu()
        return hidden @ self.layers["weight out"]

    def of(self, rollouts: Sequence[Rollout], rewards: Tensor) -> Tensor:
        """An advantage per action, (N, A), in the reward's own unit; only then V learns from these rewards."""
        with torch.no_grad():
            foretold = torch.cat([self.values(rollouts[rows]) for rows in self._parts(rollouts)]).to(rewards)
        target = (rewards - rewards.mean()).to(self.model.device, self.dtype)
        for _ in range(self.fits):
            self.optimizer.zero_grad()
            for rows in self._parts(rollouts):
                error = self.values(rollouts[rows]) - target[rows, None]
                (error.pow(2).sum() / foretold.numel()).backward()
            self.optimizer.step()
        return leave_one_out(rewards[:, None] - foretold)

    def _parts(self, rollouts: Sequence[Rollout]) -> Iterator[slice]:
        size = self.context.micro_batch
        return (slice(start, start + size) for start in range(0, len(rollouts), size))

    def state_dict(self) -> dict[str, Any]:
        """V and its optimiser."""
        layers = {name: value.detach().clone() for name, value in self.layers.items()}
        return {"layers": layers, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore V and its optimiser."""
        for name, value in self.layers.items():
            value.data.copy_(state["layers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
