"""A baseline JPEG codec without its entropy coding, differentiable where the rounding is.

Written from ITU-T T.81 (DCT, example tables of Annex K), the IJG convention of scaling those tables by a quality of
1 to 100, and JFIF (colour conversion, centred 4:2:0 subsampling). Entropy coding is lossless, so leaving it out
changes no pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance).
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF: Y, Cb, Cr of full-range R, G, B, by the luma weights of ITU-R BT.601.
RED, GREEN, BLUE = 0.299, 0.587, 0.114


def soft_round(x: Tensor) -> Tensor:
    """round(x) + (x - round(x))^3: at most 1/8 from the integer, with the slope 3 (x - round(x))^2 in [0, 3/4].

    True rounding has slope 0 almost everywhere. The value jumps by 3/4 at half-integers, as a quantiser must.
    """
    nearest = x.round()
    return nearest + (x - nearest) ** 3


def quantisation_table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Quantiser steps, int64 (8, 8) in 1..255: floor((base * percent + 50) / 100).

    The percentage is floor(5000 / quality) below quality 50 and 200 - 2 quality from there on.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is 1 to 100, not {quality}")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * percent + 50) // 100).clamp(1, 255)


def roundtrip(images_BCHW: Tensor, quality: int, rounding: Rounding) -> Tensor:
    """What a decoder shows of the encoded pictures: (B, 3, H, W), of any size, in the scale and dtype of the input.

    4:2:0: chroma is averaged over 2x2 pixels, and interpolated linearly between the centres of these when decoded, as
    libjpeg does by default. Sizes that are no multiple of 16 are continued by the edge's pixels and cut off again.

    Args:
        images_BCHW: Floating point, nominally in [0, 1]; values outside are coded as they are, without clamping.
        quality: IJG quality, 1 to 100.
        rounding: Applied to coefficients in units of their quantiser step; with `torch.round` the pixels are
            the real codec's up to its integer arithmetic, `soft_round` lets a gradient through.
    """
    height, width = images_BCHW.shape[-2:]
    rgb = _continued(_continued(images_BCHW * 255, 2), 3)
    red, green, blue = rgb.unbind(1)
    y = RED * red + GREEN * green + BLUE * blue
    # Chroma is centred at 0 here and luma is shifted to be so; files store both shifted by 128.
    chroma = torch.stack([(blue - y) / (2 - 2 * BLUE), (red - y) / (2 - 2 * RED)], 1)
    chroma = _tiled(chroma, 2).mean((3, 5))

    y = _quantised(y[:, None] - 128, quantisation_table(LUMINANCE, quality), rounding)[:, 0] + 128
    chroma = _quantised(chroma, quantisation_table(CHROMINANCE, quality), rounding)

    chroma = chroma[:, :, : math.ceil(height / 2), : math.ceil(width / 2)]
    chroma = _doubled(_doubled(chroma, 2), 3)[:, :, :height, :width]
    y = y[:, :height, :width]
    red = y + (2 - 2 * RED) * chroma[:, 1]
    blue = y + (2 - 2 * BLUE) * chroma[:, 0]
    green = (y - RED * red - BLUE * blue) / GREEN
    return torch.stack([red, green, blue], 1) / 255


def error(images_BCHW: Tensor, quality: int, rounding: Rounding = soft_round) -> Tensor:
    """Root mean square difference between pictures and their JPEG, (B,), in grey levels (255 is black to white).

    Equals 255 ||x - JPEG(x)|| / sqrt(3 H W), so that pictures of different sizes are on one scale. A millionth of a
    squared level under the root keeps the gradient finite where nothing is lost.
    """
    squared = ((images_BCHW - roundtrip(images_BCHW, quality, rounding)) * 255).square().mean((1, 2, 3))
    return (squared + 1e-6).sqrt()


def _continued(x: Tensor, dim: int) -> Tensor:
    """Repeat the last row (dim 2) or column (dim 3) up to a multiple of 16."""
    missing = -x.shape[dim] % 16
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, *[last] * missing], dim) if missing else x


def _tiled(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) as tiles, (B, C, H / side, side, W / side, side)."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // side, side, width // side, side)


def _doubled(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation to twice the size between pixel centres: weights 3/4 and 1/4, edges repeated."""
    size = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)
    return torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], dim + 1).flatten(dim, dim + 1)


def _quantised(x: Tensor, table: Tensor, rounding: Rounding) -> Tensor:
    """Through the quantised 8x8 DCT and back: (B, C, H, W) with H and W multiples of 8."""
    step = table.to(x)
    basis = _dct_matrix().to(x)
    blocks = _tiled(x, 8).transpose(3, 4)
    coefficients = rounding(basis @ blocks @ basis.T / step) * step
    return (basis.T @ coefficients @ basis).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _dct_matrix() -> Tensor:
    """The orthonormal DCT-II of length 8, float64 (8, 8): one frequency a row."""
    index = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * index[None] + 1) * index[:, None] * (math.pi / 16)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
