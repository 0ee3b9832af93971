"""A reward with a setting and a file of weights, which tests name by its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile


class Settings(RewardConfig):
    """Of `Weighted`."""

    target: float
    names: str = ""


@final
class Weighted(ConfiguredReward):
    """Minus the squared distance of the mean pixel to a target, times a stored weight."""

    name, version, differentiable, role, unit, family = "weighted", "3", True, "proxy", "pixels", "named"
    Config = Settings

    @classmethod
    def files(cls, config: Settings) -> tuple[WeightFile, ...]:
        """One file of weights, and one that need not be there."""
        return (
            WeightFile("weight.safetensors", "nobody/weighted", "abc", "0" * 64, "example.org (MIT)"),
            WeightFile("config.json", optional=True),
        )

    def __init__(
        self, device: torch.device, config: Settings, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        found = load_file(files["weight.safetensors"])
        if found.keys() != {"weight"}:
            raise UserError(f"{files['weight.safetensors']} has {sorted(found)}; expected weight")
        self.target, self.dtype, self.weight = config.target, dtype, found["weight"].to(device, dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        if not images_BCHW.requires_grad and torch.backends.cudnn.allow_tf32:
            raise AssertionError("an evaluation with convolutions in TF32")
        return -(self.weight * (images_BCHW.float().flatten(1).mean(1) - self.target) ** 2).float()

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True
