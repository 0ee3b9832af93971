"""How pictures look, by axes that no reward of this project sees: where a reward is gamed, one of them often moves.

All are of stored 8-bit pictures, so that anyone can take them again from the files. Luma is that of Rec. 601,
(299 R + 587 G + 114 B) / 255000, in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EDGE_SLOPE = 0.05  # luma per pixel: the slope that Sobel's operator finds beside a step of a tenth of the range
LEVELS = 8  # of each colour channel in the histogram of colours
HALF_NYQUIST = 0.25  # cycles per pixel
DARK_LUMA = 0.1

AXES = {
    "edge_density": "share of pixels on an edge",
    "colour_entropy": "entropy of the colours, bits",
    "saturation": "mean saturation",
    "high_frequency_energy": "share of the contrast in fine detail",
    "dark_fraction": "share of dark pixels",
}


def appearance(pictures_NHWC: NDArray[np.uint8]) -> dict[str, Array]:
    """Every axis of `AXES` by name, (N,) each, of pictures (N, H, W, 3)."""
    found = [
        (
            edge_density(luma(picture)),
            colour_entropy(picture),
            saturation(picture),
            high_frequency_energy(luma(picture)),
            dark_fraction(picture),
        )
        for picture in pictures_NHWC
    ]
    table = np.array(found, dtype=np.float64).reshape(-1, len(AXES))
    return {name: table[:, k] for k, name in enumerate(AXES)}


def luma(picture_HWC: NDArray[np.uint8]) -> Array:
    """Brightness (H, W) in [0, 1]."""
    result: Array = _thousandths(picture_HWC) / 255_000
    return result


def edge_density(luma_HW: Array) -> float:
    """Share of interior pixels where the slope of luma by Sobel's operator exceeds `EDGE_SLOPE`; range [0, 1].

    The operator's kernels [1 2 1]^T [-1 0 1] and transposed are divided by 8, so that a ramp has its own slope; beside
    a step of height h it finds h/2. What alternates from pixel to pixel has no slope by it: `high_frequency_energy`
    sees that. 0 for a picture below 3 x 3 pixels, which has no interior.
    """
    if min(luma_HW.shape) < 3:
        return 0.0
    up, middle, down = luma_HW[:-2], luma_HW[1:-1], luma_HW[2:]
    smooth, step = up + 2 * middle + down, down - up
    across = (smooth[:, 2:] - smooth[:, :-2]) / 8
    along = (step[:, :-2] + 2 * step[:, 1:-1] + step[:, 2:]) / 8
    return float((np.hypot(across, along) > EDGE_SLOPE).mean())


def colour_entropy(picture_HWC: NDArray[np.uint8]) -> float:
    """Shannon entropy in bits of the pixels' colours, each channel in 8 equal levels; range [0, 9] (512 colours)."""
    levels = (picture_HWC // (256 // LEVELS)).astype(np.int64).reshape(-1, 3)
    counts = np.bincount(levels @ np.array([LEVELS**2, LEVELS, 1]), minlength=LEVELS**3)
    shares = counts[counts > 0] / len(levels)
    return float(abs(-(shares * np.log2(shares)).sum()))


def saturation(picture_HWC: NDArray[np.uint8]) -> float:
    """Mean over pixels of HSV's saturation (max - min) / max of the channels, 0 where black; range [0, 1]."""
    largest = picture_HWC.max(axis=2).astype(np.float64)
    spread = largest - picture_HWC.min(axis=2)
    return float((spread / np.maximum(largest, 1)).mean())


def high_frequency_energy(luma_HW: Array) -> float:
    """Share of luma's power, its mean left out, at frequencies above a quarter cycle per pixel; range [0, 1].

    Frequencies are radial, those of the discrete Fourier transform, whose edges wrap around. 0 for a constant picture,
    which has no power to share; about 0.8 for white noise.
    """
    height, width = luma_HW.shape
    if np.ptp(luma_HW) == 0:
        return 0.0
    power = np.abs(np.fft.fft2(luma_HW - luma_HW.mean())) ** 2
    power[0, 0] = 0.0
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    return float(power[frequency > HALF_NYQUIST].sum() / power.sum())


def dark_fraction(picture_HWC: NDArray[np.uint8]) -> float:
    """Share of pixels with luma below a tenth; range [0, 1]."""
    return float((_thousandths(picture_HWC) < DARK_LUMA * 255_000).mean())


def _thousandths(picture_HWC: NDArray[np.uint8]) -> NDArray[np.int64]:
    # Integers, so that a constant picture is exactly constant and a threshold is exactly met.
    result: NDArray[np.int64] = picture_HWC.astype(np.int64) @ np.array([299, 587, 114])
    return result
