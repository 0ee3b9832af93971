"""Random distortions that keep the critics from judging sharpness, exact colours or exact placement.

Everything works on float32 pictures (B, 3, H, W) in [0, 1] with H and W multiples of 8, and draws from
an explicit `torch.Generator` on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Distortion:
    """How strongly pictures are distorted; every picture draws its own strengths from 0 to these.

    Attributes:
        zoom: greatest relative change of size, so that 0.1 means 0.9 to 1.1.
        shift: greatest shift in x and in y, in pixels.
        turn: greatest rotation, in degrees.
        flip: probability of a mirror image.
        blur: greatest standard deviation of a Gaussian blur, in pixels.
        shrink: share of the pictures that go through half or a third of its resolution and back,
            as through the bottleneck of an autoencoder.
        jpeg: greatest quantisation step of 8x8 cosine coefficients, in [0, 1] units.
        noise: greatest standard deviation of added noise, in [0, 1] units.
        colour: greatest relative change of brightness, contrast and saturation.
        erase: share of the pictures where a square of a quarter of the side is painted over.
    """

    zoom: float = 0.1
    shift: float = 3.0
    turn: float = 6.0
    flip: float = 0.5
    blur: float = 1.3
    shrink: float = 0.3
    jpeg: float = 0.12
    noise: float = 0.06
    colour: float = 0.15
    erase: float = 0.0


def uniform(count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return float32 (count,), uniform between `low` and `high`."""
    return torch.rand(count, generator=generator) * (high - low) + low


def distort(images: Tensor, strength: Distortion, generator: torch.Generator) -> Tensor:
    """Return distorted pictures, float32 (B, 3, H, W), nearly but not exactly within [0, 1].

    Each distortion falls on a random half of the pictures (noise on a third), so that many pictures keep
    some quality that generated ones have too.
    """

    def some(images: Tensor, portion: float, change: Callable[[Tensor], Tensor]) -> Tensor:
        chosen = torch.randperm(len(images), generator=generator)[: round(portion * len(images))]
        return images.index_copy(0, chosen, change(images[chosen])) if len(chosen) else images

    images = some(images, 0.5, lambda part: moved(part, strength, generator))
    images = recoloured(images, strength.colour, generator)
    images = some(images, strength.erase, lambda part: erased(part, generator))
    images = some(images, strength.shrink, lambda part: shrunk(part, generator))
    images = some(images, 0.5, lambda part: blurred(part, strength.blur, generator))
    images = some(images, 0.5, lambda part: quantised(part, strength.jpeg, generator))
    return some(images, 1 / 3, lambda part: noisy(part, strength.noise, generator))


def moved(images: Tensor, strength: Distortion, generator: torch.Generator) -> Tensor:
    """Zoom, shift, turn and mirror each picture; what comes in at the border repeats the edge."""
    count, _, _, width = images.shape
    angle = uniform(count, generator, -1, 1) * math.radians(strength.turn)
    scale = 1 + uniform(count, generator, -1, 1) * strength.zoom
    mirror = torch.where(uniform(count, generator) < strength.flip, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.cos(angle) / scale * mirror
    theta[:, 0, 1] = -torch.sin(angle) / scale
    theta[:, 1, 0] = torch.sin(angle) / scale * mirror
    theta[:, 1, 1] = torch.cos(angle) / scale
    limit = 2 * strength.shift / width
    theta[:, :, 2] = (torch.rand(count, 2, generator=generator) * 2 - 1) * limit
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recoloured(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation of each picture by up to `amount`."""
    count = len(images)

    def factor() -> Tensor:
        return uniform(count, generator, -amount, amount).view(-1, 1, 1, 1)

    images = images + factor() * 0.5
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (1 + factor())
    grey = images.mean(1, keepdim=True)
    return grey + (images - grey) * (1 + factor())


def erased(images: Tensor, generator: torch.Generator) -> Tensor:
    """Paint a square of a quarter of the side over each picture, in a random colour."""
    count, _, height, width = images.shape
    side = width // 4
    top = torch.randint(height - side + 1, (count, 1, 1, 1), generator=generator)
    left = torch.randint(width - side + 1, (count, 1, 1, 1), generator=generator)
    row = torch.arange(height).view(1, 1, -1, 1)
    column = torch.arange(width).view(1, 1, 1, -1)
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return torch.where(inside, torch.rand(count, 3, 1, 1, generator=generator), images)


def shrunk(images: Tensor, generator: torch.Generator) -> Tensor:
    """Send pictures through half or a third of their resolution and mix the result with the original."""
    height, width = images.shape[-2:]
    divisor = 2 if bool(uniform(1, generator) < 0.5) else 3
    small = F.interpolate(images, (height // divisor, width // divisor), mode="bilinear", antialias=True)
    back = F.interpolate(small, (height, width), mode="bilinear")
    return torch.lerp(images, back, uniform(len(images), generator, 0.3, 1.0).view(-1, 1, 1, 1))


def blurred(images: Tensor, greatest: float, generator: torch.Generator) -> Tensor:
    """Blur each picture by a Gaussian of its own width, up to `greatest` pixels."""
    height, width = images.shape[-2:]
    sigma = uniform(len(images), generator).mul(greatest).clamp_min(0.05).view(-1, 1, 1, 1)

    def matrix(size: int) -> Tensor:
        position = torch.arange(size, dtype=torch.float32)
        return torch.softmax(-0.5 * ((position[:, None] - position[None, :]) / sigma) ** 2, -1)

    return matrix(height) @ images @ matrix(width).transpose(-1, -2)


def quantised(images: Tensor, greatest: float, generator: torch.Generator) -> Tensor:
    """Round 8x8 cosine coefficients as JPEG does, coarser at higher frequencies."""
    count, channels, height, width = images.shape
    position = torch.arange(8, dtype=torch.float32)
    basis = torch.cos(math.pi / 8 * (position[None, :] + 0.5) * position[:, None]) * 0.5
    basis[0] /= math.sqrt(2)
    blocks = images.reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    step = uniform(count, generator, 0.01, max(greatest, 0.02)).view(-1, 1, 1, 1, 1, 1)
    step = step * (1 + (position[:, None] + position[None, :]))
    coarse = torch.round(basis @ blocks @ basis.T / step) * step
    return (basis.T @ coarse @ basis).transpose(3, 4).reshape(images.shape)


def noisy(images: Tensor, greatest: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of a deviation of each picture's own, up to `greatest`."""
    deviation = uniform(len(images), generator, 0, greatest).view(-1, 1, 1, 1)
    return images + torch.randn(images.shape, generator=generator) * deviation
