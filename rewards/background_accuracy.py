"""Gold metric: is the background of the colour that the prompt names?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from harness.api import Prompt, Reward
from rewards import _emoji
from rewards._preprocessing import known

BORDER = 4


@final
class BackgroundAccuracy(Reward):
    """Whether the border of the picture has the background colour that the prompt names.

    Formula: 1 if, among the 12 colours of `models/emoji/vocabulary.json`, the prompt's `colour` is nearest (Euclidean,
    RGB) to the median of the pixels within 4 pixels of the edge, each channel on its own; else 0. Range: {0, 1}, its
    mean is an accuracy in [0, 1]; larger is better. Gold: no network, nothing learnt. Pictures are clamped to [0, 1]
    and, where they are not 64x64, resized, antialiased. No gradient.
    """

    name = "background-accuracy"
    version = "1"
    differentiable = False
    role = "gold"
    unit = "share"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        colours: dict[str, list[int]] = _emoji.vocabulary()["colours"]
        self._labels = {name: i for i, name in enumerate(colours)}
        self._colours = torch.tensor(list(colours.values()), dtype=torch.float32, device=device) / 255

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), 0 or 1; NaN where a picture is not finite or the prompt names no known colour."""
        images = _emoji.resized(images_BCHW.clamp(0, 1))
        inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
        inside[BORDER:-BORDER, BORDER:-BORDER] = True
        border = images[:, :, ~inside].median(-1).values
        found = (border[:, None] - self._colours[None]).square().sum(-1).argmin(1)
        right = [
            float(label == self._labels[prompt.metadata["colour"]]) if self.applies(prompt) else float("nan")
            for label, prompt in zip(found.tolist(), prompts, strict=True)
        ]
        return known(torch.tensor(right, device=images_BCHW.device), images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Where `metadata["colour"]` is one of the vocabulary's 12 colours."""
        name = prompt.metadata.get("colour")
        return isinstance(name, str) and name in self._labels
