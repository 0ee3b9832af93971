"""From pictures of any size to what a reward's network takes, in tensors: a gradient passes, nothing is rounded.

References preprocess PIL pictures or tensors of 8 bits; these functions do the same arithmetic without the rounding.
Bicubic resizing with antialiasing is then PIL's (the same kernel, a = -0.5, widened by the reduction); without it, it
is what torchvision did with tensors up to 0.16 (a = -0.75, four neighbours whatever the reduction).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def as_pictures(images_BCHW: Tensor) -> Tensor:
    """The pictures in float32, or in float64 if they are.

    Raises:
        ValueError: They are no floating-point (B, 3, H, W) with at least one pixel.
    """
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:] or not images_BCHW.is_floating_point():
        raise ValueError(
            f"pictures are floating point (B, 3, H, W) in [0, 1], not {str(images_BCHW.dtype)[6:]} {shape}; "
            "convert 8-bit ones by x / 255, and grey ones or ones with transparency to three channels"
        )
    return images_BCHW if images_BCHW.dtype == torch.float64 else images_BCHW.float()


def known(scores_B: Tensor, images_BCHW: Tensor) -> Tensor:
    """The scores, with NaN where a picture has a value that is not finite, also one that cropping would hide."""
    return torch.where(images_BCHW.isfinite().flatten(1).all(1), scores_B, float("nan"))


def resize_shortest_side_and_crop(
    images_BCHW: Tensor, size: int, antialias: bool = True, crop: Literal["round", "floor"] = "round"
) -> Tensor:
    """Resize so that the shorter side is `size`, bicubic, and cut the middle square (B, C, size, size).

    The longer side becomes floor(size * long / short), as in torchvision and transformers.

    Args:
        images_BCHW: Floating point, of any size.
        size: Side of the square.
        antialias: Whether to filter what is made smaller.
        crop: Where the square starts when an odd number of pixels d is cut: `round` takes d/2 rounded half to even
            (torchvision, hence open_clip, CLIP and ImageReward), `floor` d//2 (transformers). They differ by one pixel
            where d = 3, 7, 11...
    """
    height, width = images_BCHW.shape[-2:]
    short, long = min(height, width), max(height, width)
    longer = int(size * long / short)
    resized = _resized(images_BCHW, (size, longer) if height <= width else (longer, size), antialias)
    excess = longer - size
    start = excess // 2 if crop == "floor" else round(excess / 2)
    return resized.narrow(-1 if height <= width else -2, start, size)


def letterbox(images_BCHW: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize so that the longer side is `size`, bicubic, and pad the shorter one with zeros to (B, C, size, size).

    The shorter side becomes round(size * short / long), half to even, at least 1. Of an odd number of missing pixels
    the smaller half is at the top or left. As HPSv2 does, whose code leaves pictures with a longer side of exactly
    `size` unpadded and then fails unless they are square; here they are padded as any others.

    Args:
        images_BCHW: Floating point, of any size.
        size: Side of the square.
        antialias: Whether to filter what is made smaller.
    """
    height, width = images_BCHW.shape[-2:]
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(
        _resized(images_BCHW, (height, width), antialias), (left, size - width - left, top, size - height - top)
    )


def normalised(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std, by channel."""
    return (images_BCHW - images_BCHW.new_tensor(mean).view(1, -1, 1, 1)) / images_BCHW.new_tensor(std).view(
        1, -1, 1, 1
    )


def _resized(images_BCHW: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    if tuple(images_BCHW.shape[-2:]) == size:
        return images_BCHW
    return F.interpolate(images_BCHW, size, mode="bicubic", align_corners=False, antialias=antialias)
