"""Axes of appearance against pictures whose values are known: constants, steps, ramps, chessboards, waves, noise."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray

from harness.metrics.appearance import AXES, appearance

SIZE = 32
Picture = NDArray[np.uint8]


def grey(levels_HW: NDArray[np.float64]) -> Picture:
    """A grey picture of levels 0 to 255."""
    return np.repeat(np.round(levels_HW)[:, :, None], 3, axis=2).astype(np.uint8)


def one(picture: Picture) -> dict[str, float]:
    """The axes of one picture."""
    return {name: float(values[0]) for name, values in appearance(picture[None]).items()}


ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (25, 25, 25), (26, 26, 26)])
def test_a_constant_picture_has_no_detail(colour: tuple[int, int, int]) -> None:
    """No edge, one colour, no contrast; saturation is HSV's, and dark is below a tenth of the range."""
    found = one(np.full((SIZE, SIZE, 3), colour, dtype=np.uint8))
    assert (found["edge_density"], found["colour_entropy"], found["high_frequency_energy"]) == (0.0, 0.0, 0.0)
    assert found["saturation"] == pytest.approx(colorsys.rgb_to_hsv(*(c / 255 for c in colour))[1], abs=1e-12)
    assert found["dark_fraction"] == float(colorsys.rgb_to_yiq(*(c / 255 for c in colour))[0] < 0.1)


@pytest.mark.parametrize(("height", "edge"), [(255, True), (40, True), (20, False)])
def test_a_step_is_an_edge_of_two_columns_where_it_is_high(height: int, edge: bool) -> None:
    """Sobel's operator answers on both sides of a step, by half its height: 20 / 255 / 2 is below the threshold."""
    for picture in (grey(height * (COLUMNS >= 10)), grey(height * (ROWS >= 10))):
        assert one(picture)["edge_density"] == pytest.approx(2 / (SIZE - 2) if edge else 0.0)


def test_a_ramp_is_an_edge_everywhere_or_nowhere() -> None:
    """Its slope is the same at all pixels: 14 levels a pixel are above the threshold of 0.05, 12 are below."""
    short = COLUMNS[:, :18]
    assert one(grey(14 * short))["edge_density"] == 1.0
    assert one(grey(12 * short))["edge_density"] == 0.0
    assert one(grey(12 * short + 12 * ROWS[:, :18] * (ROWS[:, :18] < 4)))["edge_density"] > 0.0


def test_the_finest_chessboard_is_all_detail_and_no_edge() -> None:
    """What alternates from pixel to pixel has no slope, and all of its power is at the highest frequency."""
    found = one(grey(255 * ((ROWS + COLUMNS) % 2)))
    assert found["edge_density"] == 0.0
    assert found["high_frequency_energy"] == pytest.approx(1.0)
    assert found["colour_entropy"] == pytest.approx(1.0)
    assert (found["dark_fraction"], found["saturation"]) == (0.5, 0.0)


@pytest.mark.parametrize("waves", [1, 4, 8, 9, 12, 16])
def test_a_wave_has_its_power_at_its_frequency(waves: int) -> None:
    """Up to a quarter cycle per pixel (8 waves on 32 pixels) it is coarse, beyond it is fine."""
    wave = 127.5 + 100 * np.cos(2 * np.pi * waves * COLUMNS / SIZE)
    assert one(grey(wave))["high_frequency_energy"] == pytest.approx(float(waves > SIZE / 4), abs=1e-3)


def test_two_waves_share_their_power() -> None:
    """Amplitudes 90 and 30 have power 9 to 1."""
    mixed = 127.5 + 90 * np.cos(2 * np.pi * 2 * COLUMNS / SIZE) + 30 * np.cos(2 * np.pi * 13 * ROWS / SIZE)
    assert one(grey(mixed))["high_frequency_energy"] == pytest.approx(0.1, abs=1e-3)


def test_white_noise_has_what_the_frequencies_outside_a_circle_have() -> None:
    """Its power is the same everywhere: 1 - pi / 16 of the square of frequencies; its slopes and colours abound."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    found = {name: values.mean() for name, values in appearance(noise).items()}
    assert found["high_frequency_energy"] == pytest.approx(1 - np.pi / 16, abs=0.01)
    assert found["colour_entropy"] == pytest.approx(9.0, abs=0.15)
    # Of three uniform numbers, the two below the largest are uniform up to it: the smaller is a third of it on average.
    assert found["saturation"] == pytest.approx(2 / 3, abs=0.01)
    assert found["edge_density"] > 0.8


def test_every_colour_once_is_all_the_entropy() -> None:
    """512 colours, one of each cell of the histogram, are 9 bits; two in one cell count as one."""
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 32)] * 3, indexing="ij"), -1).reshape(16, 32, 3).astype(np.uint8)
    assert one(cube)["colour_entropy"] == pytest.approx(9.0)
    assert one(cube + np.uint8(31))["colour_entropy"] == pytest.approx(9.0)
    quarter = np.zeros((4, 4, 3), dtype=np.uint8)
    quarter[0] = 255
    assert one(quarter)["colour_entropy"] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def test_axes_are_in_their_ranges_and_do_not_depend_on_neighbours() -> None:
    """A picture's values are its own, whatever is beside it in the batch; turning it changes none of them."""
    rng = np.random.default_rng(1)
    pictures = (rng.random((6, 12, 12, 3)) ** 3 * 255).astype(np.uint8)
    every = appearance(pictures)
    assert tuple(every) == tuple(AXES)
    for name, values in every.items():
        assert (values >= 0).all()
        assert (values <= (9 if name == "colour_entropy" else 1)).all()
        np.testing.assert_array_equal(values[3:4], appearance(pictures[3:4])[name])
        np.testing.assert_allclose(appearance(np.rot90(pictures, axes=(1, 2)))[name], values, atol=1e-12)
    assert appearance(pictures[:, :2])["edge_density"].tolist() == [0.0] * 6
    assert all(len(values) == 0 for values in appearance(pictures[:0]).values())
