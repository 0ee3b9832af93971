"""What rewards do to pictures, against torchvision's and transformers' own code."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from rewards._preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    as_pictures,
    known,
    letterbox,
    normalised,
    resize_shortest_side_and_crop,
)

BICUBIC = functional.InterpolationMode.BICUBIC
SIZES = [(300, 701), (701, 300), (224, 224), (64, 64), (225, 226), (512, 513), (33, 400), (5, 7), (230, 227)]


def noise(height: int, width: int, rows: int = 2) -> Tensor:
    """Pictures of uniform noise, the worst case of resizing."""
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_resize_and_crop_is_torchvisions(height: int, width: int, antialias: bool) -> None:
    """Bit-equal on float tensors."""
    images = noise(height, width)
    resized = functional.resize(images, 224, BICUBIC, antialias=antialias)
    expected = functional.center_crop(resized, [224, 224])
    assert torch.equal(resize_shortest_side_and_crop(images, 224, antialias), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resize_and_floored_crop_is_that_of_transformers(height: int, width: int) -> None:
    """Up to the arithmetic of its normalisation; also where its offset differs from torchvision's."""
    from transformers import CLIPImageProcessor

    images = noise(height, width, 1)
    expected = CLIPImageProcessor()(images[0], do_rescale=False, return_tensors="pt")["pixel_values"]
    pixels = normalised(resize_shortest_side_and_crop(images, 224, crop="floor"), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-6)


def test_crop_conventions_differ_where_stated() -> None:
    """The picture is a ramp over its columns: the first column that is left names the offset."""
    offsets = {}
    for excess, crop in itertools.product(range(9), ("round", "floor")):
        ramp = torch.arange(8.0 + excess).expand(1, 3, 8, 8 + excess)
        offsets[excess, crop] = int(resize_shortest_side_and_crop(ramp, 8, crop=crop)[0, 0, 0, 0])
        assert torch.equal(
            resize_shortest_side_and_crop(ramp.transpose(2, 3), 8, crop=crop),
            resize_shortest_side_and_crop(ramp, 8, crop=crop).transpose(2, 3),
        )
    assert [offsets[excess, "floor"] for excess in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert [offsets[excess, "round"] for excess in range(9)] == [0, 0, 1, 2, 2, 2, 3, 4, 4]


def reference_letterbox(image: Tensor, antialias: bool) -> Tensor:
    """What HPSv2's transform does to a float tensor (3, H, W) whose longer side is not 224."""
    height, width = image.shape[1:]
    ratio = 224 / float(max(height, width))
    size = [round(height * ratio), round(width * ratio)]
    image = functional.resize(image, size, BICUBIC, antialias=antialias)
    below, right = 224 - size[0], 224 - size[1]
    result: Tensor = functional.pad(image, [right // 2, below // 2, right - right // 2, below - below // 2], fill=0)
    return result


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if max(size) != 224])
@pytest.mark.parametrize("antialias", [True, False])
def test_letterbox_is_the_references(height: int, width: int, antialias: bool) -> None:
    """Bit-equal."""
    images = noise(height, width)
    expected = torch.stack([reference_letterbox(image, antialias) for image in images])
    assert torch.equal(letterbox(images, 224, antialias), expected)


def test_letterbox_where_the_reference_has_no_answer() -> None:
    """A longer side of the very size is padded as others are, and a thread of a picture keeps one pixel."""
    images = noise(224, 101)
    boxed = letterbox(images, 224)
    assert torch.equal(boxed[..., 61:162], images)
    assert float(boxed[..., :61].abs().sum() + boxed[..., 162:].abs().sum()) == 0
    thread = letterbox(torch.ones(1, 3, 1, 2000), 224)
    assert torch.nonzero(thread[0, 0].sum(1)).flatten().tolist() == [111]


@pytest.mark.parametrize("function", [letterbox, resize_shortest_side_and_crop])
@pytest.mark.parametrize("size", [(9, 14), (14, 9), (5, 5)])
def test_gradients(function: Callable[[Tensor, int], Tensor], size: tuple[int, int]) -> None:
    """Against finite differences in double precision."""
    images = noise(*size, rows=1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: function(x, 8), images)


def test_what_counts_as_pictures() -> None:
    """Precision is raised, never lowered; anything but floating point of three channels is refused."""
    assert as_pictures(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert as_pictures(torch.zeros(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
    for refused in (
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        torch.zeros(1, 1, 2, 2),
        torch.zeros(1, 4, 2, 2),
        torch.zeros(3, 2, 2),
        torch.zeros(1, 3, 0, 2),
    ):
        with pytest.raises(ValueError, match="three channels"):
            as_pictures(refused)


def test_a_value_that_cropping_hides_is_seen() -> None:
    """A NaN at the edge makes the score of its picture NaN, and of no other."""
    images = torch.zeros(3, 3, 4, 20)
    images[0, 0, 0, 0], images[2, 1, 3, 19] = float("nan"), float("inf")
    assert known(torch.tensor([1.0, 2.0, 3.0]), images).isnan().tolist() == [True, False, True]


def test_normalised_by_channel() -> None:
    """Against the definition."""
    images = noise(4, 5)
    expected = functional.normalize(images, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(normalised(images, CLIP_MEAN, CLIP_STD), expected, rtol=1e-6, atol=1e-6)
