"""Rewards that need no weights, and the watch that is kept on one: what contracts train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.api import Prompt, Reward


class QuadraticReward(Reward):
    """Minus the mean squared distance of the pixels to 0.8: concave.

    Args:
        device: As for every reward.
        largest: What the best pictures score.
    """

    name, version, differentiable, role, unit = "quadratic", "1", True, "proxy", "squared pixels"

    def __init__(self, device: torch.device, largest: float = 0.0) -> None:
        self.device, self.largest = device, largest

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores in the pictures' own precision."""
        return self.largest - ((images_BCHW - 0.8) ** 2).flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class BrightnessReward(Reward):
    """The mean pixel, without a gradient, as a reward that calls an encoder is."""

    name, version, differentiable, role, unit = "brightness", "1", False, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores of detached pictures."""
        return images_BCHW.detach().flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class BrokenReward(Reward):
    """The mean pixel plus a constant that is not a number."""

    name, version, differentiable, role, unit = "broken", "1", True, "proxy", "nothing"
    offset = float("nan")

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Not numbers, with a finite gradient."""
        return images_BCHW.flatten(1).mean(1) + self.offset

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class Hang(AssertionError):  # noqa: N818 - what is seen of a method
    """A method asks for scores without end."""


class Watch(Reward):
    """A reward that remembers what it was asked.

    Args:
        inner: The reward itself.
        patience: How many pictures it scores before it gives up on a method that never stops.

    Attributes:
        prompts: Ids of the prompts that it was asked about.
        pictures: How many pictures it scored.
        pixels: How many pixels these had.
        smallest, largest: Of all pixels.
    """

    version, role, unit = "1", "proxy", "as the inner reward"

    def __init__(self, inner: Reward, patience: float = float("inf")) -> None:
        self.inner, self.patience = inner, patience
        self.name, self.differentiable = inner.name, inner.differentiable  # type: ignore[misc]
        self.prompts: set[str] = set()
        self.pictures, self.pixels = 0, 0
        self.smallest, self.largest = float("inf"), -float("inf")

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The inner reward's scores."""
        self.prompts |= {prompt.id for prompt in prompts}
        self.pictures += len(images_BCHW)
        self.pixels += images_BCHW.numel()
        self.smallest = min(self.smallest, images_BCHW.min().item())
        self.largest = max(self.largest, images_BCHW.max().item())
        if self.pictures > self.patience:
            raise Hang(f"it went on asking for scores after {self.patience:.0f} pictures")
        return self.inner(images_BCHW, prompts)

    def applies(self, prompt: Prompt) -> bool:
        """Where the inner reward does."""
        return self.inner.applies(prompt)
