"""A method whose effect is known beforehand, and the reward that measures it; named as `path/to/planted.py:Class`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.api import (
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    MethodConfig,
    Prompt,
    Request,
    Reward,
    TrainedFineTuner,
)

MEAN, SD = 0.15, 0.1


class Brightness(Reward):
    """The mean pixel."""

    name, version, differentiable, role, unit = "brightness", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return images_BCHW.float().flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class Planted(TrainedFineTuner):
    """Lowers the predicted noise by a number of the seed's own, normal with the mean and SD above, and stays there."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = MethodConfig
    requests_per_iteration = 1  # type: ignore[assignment]

    def __init__(self, model: DiffusionModel, reward: Reward, config: MethodConfig, context: Context) -> None:
        self.model, self.reward = model, reward
        self.step = MEAN + SD * float(context.randomness.normal((), "planted"))

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """One query, of the noise taken as a picture, which changes nothing."""
        self.model.adapter_parameters()["bias"].data.fill_(-self.step)
        scores = self.reward(torch.stack([r.noise for r in requests]), [r.prompt for r in requests])
        return {"reward": float(scores.mean()), "gradient_norm": 0.0}

    def planned_cost(self) -> CostRange:
        """One query."""
        return CostRange(Cost(queries=1), Cost(queries=1))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
