"""Alignment of picture and prompt by two independent small CLIPs: one to train on, one to check with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from harness.api import Embedding, Prompt, Reward
from rewards._emoji import ClipCritic


@final
class EmojiClip(Reward):
    """How well an emoji picture fits its prompt, by a small CLIP.

    Formula: 100 * cos(image embedding, text embedding) of a dual encoder (ResNet and a text transformer) trained on
    compositions of emoji and their captions ("a 3d fox on a blue background"). Range: [-100, 100], typically 81 for the
    full caption, 76 for the animal alone and 32 where the animal is another; larger is better. Pictures that are not
    64x64 are resized, antialiased; texts are cut at 24 tokens.
    """

    name = "emoji-clip"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "100 cos"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        self._critic = ClipCritic("clip", device)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in [-100, 100]; NaN where a picture is not finite."""
        return self._critic(images_BCHW, [prompt.text for prompt in prompts])

    def applies(self, prompt: Prompt) -> bool:
        """Always: every text has an embedding."""
        return True


@final
class EmojiClipHeldout(Reward):
    """How well an emoji picture fits its prompt, by another CLIP that no method trains on.

    Formula: 100 * cos(image embedding, text embedding), as `emoji-clip`, by a RegNet with another text transformer,
    seed, data order and distortions. Range: [-100, 100]; larger is better. A gain of `emoji-clip` without a gain here
    is reward hacking.
    """

    name = "emoji-clip-heldout"
    version = "1"
    differentiable = True
    role = "held-out"
    unit = "100 cos"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        self._critic = ClipCritic("clip_heldout", device)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in [-100, 100]; NaN where a picture is not finite."""
        return self._critic(images_BCHW, [prompt.text for prompt in prompts])

    def applies(self, prompt: Prompt) -> bool:
        """Always: every text has an embedding."""
        return True


@final
class EmojiEmbedding(Embedding):
    """What the picture tower of the held-out CLIP sees: no method is trained on it."""

    name = "emoji-clip-heldout"
    version = "1"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        self._critic = ClipCritic("clip_heldout", device)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Unit vectors (B, D)."""
        return self._critic.pictures(images_BCHW)
