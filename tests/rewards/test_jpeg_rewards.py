"""The three JPEG rewards: direction, scale, and pictures that are no pictures."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.prompts import Prompt
from rewards.jpeg import JpegBytes, JpegCompressibility, JpegIncompressibility

CPU = torch.device("cpu")


def test_the_two_differentiable_rewards_are_opposite(pictures: Tensor, prompts: list[Prompt]) -> None:
    """Compressibility is at most 0, incompressibility its negative, both float32 (B,)."""
    down, up = JpegCompressibility(CPU)(pictures, prompts), JpegIncompressibility(CPU)(pictures, prompts)
    assert down.shape == (24,)
    assert down.dtype == torch.float32
    assert torch.equal(down, -up)
    assert bool((down < 0).all())


def test_plain_pictures_compress_better_than_noise() -> None:
    """A plain surface scores near 0 by all measures, noise far below."""
    generator = torch.Generator().manual_seed(1)
    pair = torch.stack([torch.full((3, 64, 64), 0.3), torch.rand(3, 64, 64, generator=generator)])
    prompts = [Prompt("a", "a"), Prompt("b", "b")]
    plain, noise = JpegCompressibility(CPU)(pair, prompts).tolist()
    assert plain > -2
    assert noise < -40
    light, heavy = JpegBytes(CPU)(pair, prompts).tolist()
    assert light > -0.8
    assert heavy < -4


def test_bytes_are_those_of_a_file_on_disk(pictures: Tensor, prompts: list[Prompt], tmp_path: Path) -> None:
    """Minus the size of the saved file in units of 1000 bytes; values beyond [0, 1] count as clamped."""
    stretched = pictures * 1.2 - 0.1
    scores = JpegBytes(CPU)(stretched, prompts)
    for i in range(3):
        path = tmp_path / f"{i}.jpg"
        levels = (stretched[i].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(path, quality=95, subsampling=2)
        assert float(scores[i]) == pytest.approx(-path.stat().st_size / 1000)


@pytest.mark.parametrize("reward", [JpegCompressibility, JpegIncompressibility, JpegBytes])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_picture_scores_nan_and_leaves_the_others_alone(
    pictures: Tensor, prompts: list[Prompt], reward: type, value: float
) -> None:
    """One value that is not finite spoils its own picture only."""
    broken = pictures[:3].clone()
    broken[1, 2, 40, 7] = value
    scores = reward(CPU)(broken, prompts[:3])
    assert scores.isnan().tolist() == [False, True, False]
    assert torch.allclose(scores[[0, 2]], reward(CPU)(pictures[[0, 2]], prompts[:2]), rtol=1e-5)
