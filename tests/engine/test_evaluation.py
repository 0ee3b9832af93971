"""Stored pictures: how float pictures become 8-bit ones."""

from __future__ import annotations

import torch

from harness.evaluation import from_8_bit, to_8_bit


def test_pictures_are_clamped_and_rounded_to_the_nearest_level() -> None:
    """Values are clamped to [0, 1] and rounded, not cut off; what is not a number becomes black."""
    levels = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 99.5001 / 255, 254.6 / 255, 1.7, float("nan")])
    pictures = to_8_bit(levels.view(1, 1, 1, 7).expand(1, 3, 1, 7))
    assert pictures[0, 0, :, 0].tolist() == [0, 0, 1, 100, 255, 255, 0]
    assert torch.equal(from_8_bit(pictures, torch.device("cpu"))[0, 0, 0, 3], torch.tensor(100 / 255))
