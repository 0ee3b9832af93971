"""JPEG rewards: how much the codec loses (differentiable) and how many bytes it writes (not)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import final

import torch
from PIL import Image
from torch import Tensor

from harness.api import Prompt, Reward
from rewards import _jpeg

# The tables of the standard as they are printed (percentage 100).
QUALITY = 50


@final
class JpegCompressibility(Reward):
    """Minus what JPEG loses of the picture: smooth, plain pictures score high.

    Formula: -255 ||x - JPEG(x)|| / sqrt(3 H W), the root mean square difference to the picture's own JPEG of quality
    50 with 4:2:0 and softly rounded coefficients (see `_jpeg.py`). DRaFT uses -||x - JPEG(x)||; quality and norm are
    not in the paper, so both are choices of this project, and dividing by the number of values makes sizes
    comparable. Range: up to 0 (nothing lost), -4 to -20 for pictures of emoji; larger is better. Pictures are neither
    clamped nor resized. It agrees with the size of the file (`jpeg-bytes`) in direction, not in every pair of pictures.
    """

    name = "jpeg-compressibility"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "grey levels (RMS)"
    family = "any"

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), at most 0; NaN where a picture is not finite."""
        return -_jpeg.error(images_BCHW.float(), QUALITY)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


@final
class JpegIncompressibility(Reward):
    """What JPEG loses of the picture: detail, noise and sharp colour edges score high.

    Formula: +255 ||x - JPEG(x)|| / sqrt(3 H W), the negative of `jpeg-compressibility`. Range: from 0 (nothing lost),
    4 to 20 for pictures of emoji; larger is better. Without a bound from above: pictures are not clamped, and chroma
    detail finer than two pixels is lost whatever its strength.
    """

    name = "jpeg-incompressibility"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "grey levels (RMS)"
    family = "any"

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), at least 0; NaN where a picture is not finite."""
        return _jpeg.error(images_BCHW.float(), QUALITY)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


@final
class JpegBytes(Reward):
    """Minus the size of the picture as a real JPEG file, in kilobytes.

    Formula: -(bytes of Pillow's encoding at quality 95, 4:2:0) / 1000, of the picture clamped to [0, 1] and rounded to
    8 bits; DDPO's compressibility. Range: below 0 (the headers alone are 0.6 kB), -1.2 to -4 for pictures of 64x64;
    larger is better (smaller files). No gradient.
    """

    name = "jpeg-bytes"
    version = "1"
    differentiable = False
    role = "proxy"
    unit = "kB"
    family = "any"

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), below 0; NaN where a picture is not finite."""
        finite = images_BCHW.isfinite().flatten(1).all(1).tolist()
        levels = (images_BCHW.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        rows = levels.permute(0, 2, 3, 1).cpu().numpy()
        sizes = [-_encoded_bytes(Image.fromarray(row)) / 1000 for row in rows]
        scores = [size if known else float("nan") for size, known in zip(sizes, finite, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images_BCHW.device)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


def _encoded_bytes(picture: Image.Image) -> int:
    """Size of the file in bytes, headers included."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=95, subsampling="4:2:0")
    return file.tell()
