"""The laboratory's aesthetic reward: is the emoji drawn in the 3D style? By two independent classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from harness.api import Prompt, Reward
from rewards._emoji import StyleCritic


@final
class Emoji3d(Reward):
    """Log-odds that an emoji picture is in the 3D style (not flat, not simple).

    Formula: log p - log(1 - p) = z_3d - logsumexp(z_flat, z_simple), by a small ResNet trained on compositions in three
    styles with cross-fades between them. Range: all reals, typically about -4 for flat and simple pictures and +3 for
    3D ones, in natural-log units; 0 is undecided; larger is better. The prompt is not read. Pictures that are not 64x64
    are resized, antialiased.
    """

    name = "emoji-3d"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "nats"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        self._critic = StyleCritic("style3d", device)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), any real number; NaN where a picture is not finite."""
        return self._critic(images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


@final
class Emoji3dHeldout(Reward):
    """Log-odds of the 3D style by another classifier that no method trains on.

    Formula: log p - log(1 - p), as `emoji-3d`, by a RegNet with other seed and distortions. Range: all reals, in
    natural-log units, typically -3.9 and +2.5; larger is better. A gain of `emoji-3d` without a gain here is reward
    hacking.
    """

    name = "emoji-3d-heldout"
    version = "1"
    differentiable = True
    role = "held-out"
    unit = "nats"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        self._critic = StyleCritic("style3d_heldout", device)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), any real number; NaN where a picture is not finite."""
        return self._critic(images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True
