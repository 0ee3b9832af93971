"""Gold metric: does the picture show the animal that the prompt names?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from harness.api import Prompt, Reward
from rewards import _emoji
from rewards._preprocessing import known


@final
class ObjectAccuracy(Reward):
    """Whether a classifier of emoji recognises the animal that the prompt names.

    Formula: 1 if the largest of the classifier's logits is that of the prompt's `object`, else 0. Range: {0, 1}, its
    mean is an accuracy in [0, 1]; larger is better. Gold: a network of its own, with stronger distortions, that no
    reward shares; its accuracy on real compositions, the most that a generator can reach, is in
    `models/emoji/critics/metrics.json`. Pictures are clamped to [0, 1] and, where they are not 64x64, resized,
    antialiased. No gradient.
    """

    name = "object-accuracy"
    version = "1"
    differentiable = False
    role = "gold"
    unit = "share"
    family = "emoji"

    def __init__(self, device: torch.device) -> None:
        self._network = _emoji.load("object", device)
        self._labels: dict[str, int] = {name: int(i) for name, i in self._network.config.label2id.items()}

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), 0 or 1; NaN where a picture is not finite or the prompt names no known object."""
        found = _emoji.logits(self._network, images_BCHW.clamp(0, 1)).argmax(1)
        right = [
            float(label == self._labels[prompt.metadata["object"]]) if self.applies(prompt) else float("nan")
            for label, prompt in zip(found.tolist(), prompts, strict=True)
        ]
        return known(torch.tensor(right, device=images_BCHW.device), images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Where `metadata["object"]` is one of the classifier's animals."""
        name = prompt.metadata.get("object")
        return isinstance(name, str) and name in self._labels
