"""A picture as its own small copy: an embedding that needs no weights and makes sense on any model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness.api import Embedding


class PixelEmbedding(Embedding):
    """The picture at 8x8 pixels, antialiased, minus mid-grey: (B, 192)."""

    name = "pixels"
    version = "1"
    family = "any"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Vectors (B, 192)."""
        small = interpolate(images_BCHW.float(), size=(8, 8), mode="bilinear", antialias=True)
        return (small - 0.5).flatten(1)
