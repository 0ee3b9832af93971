"""The differentiable codec against Pillow's real one, and its gradient against finite differences."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rewards import _jpeg


def real_jpeg(pictures: Tensor, quality: int) -> tuple[Tensor, list[int]]:
    """Pictures as Pillow encodes and decodes them with 4:2:0, and the sizes of the files in bytes."""
    decoded, sizes = [], []
    for picture in pictures:
        file = io.BytesIO()
        levels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        sizes.append(file.tell())
        with Image.open(file) as opened:
            decoded.append(torch.from_numpy(np.array(opened)).permute(2, 0, 1) / 255)
    return torch.stack(decoded), sizes


def half_away(x: Tensor) -> Tensor:
    """Rounding as in the real codec: halves, which flat surfaces give exactly, go away from zero."""
    return x.sign() * (x.abs() + (0.5 + 1e-4)).floor()


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Pictures behind a Gaussian blur."""
    place = torch.arange(-6.0, 7.0)
    kernel = torch.softmax(-0.5 * (place / sigma) ** 2, 0)
    plane = F.pad(pictures, (6, 6, 6, 6), mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(plane, kernel.view(1, 1, 1, 13)), kernel.view(1, 1, 13, 1)).view(pictures.shape)


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 75, 95, 100])
def test_quantisation_tables_are_those_in_a_real_file(quality: int) -> None:
    """The scaled tables equal the ones that Pillow writes into the file's header."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    with Image.open(file) as opened:
        written = opened.quantization  # type: ignore[attr-defined]
    for index, base in enumerate((_jpeg.LUMINANCE, _jpeg.CHROMINANCE)):
        assert _jpeg.quantisation_table(base, quality).flatten().tolist() == list(written[index])


@pytest.mark.parametrize("quality", [0, 101])
def test_quality_out_of_range_is_refused(quality: int) -> None:
    """Only 1 to 100 mean anything."""
    with pytest.raises(ValueError, match="1 to 100"):
        _jpeg.quantisation_table(_jpeg.LUMINANCE, quality)


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("size", [(64, 64), (50, 37), (9, 16), (1, 3)])
def test_hard_rounding_gives_the_pixels_of_a_real_decoder(
    pictures: Tensor, quality: int, size: tuple[int, int]
) -> None:
    """Mean difference below 1.6 grey levels; the rest is the integer arithmetic of the real codec.

    In grey pictures, where chroma plays no part, it is below 0.4 levels, and 97 % of the pixels are within one level.
    """
    colour = pictures[:, :, : size[0], : size[1]]
    ours = (_jpeg.roundtrip(colour, quality, half_away).clamp(0, 1) * 255).round()
    assert (ours - real_jpeg(colour, quality)[0] * 255).abs().mean() < 1.6
    grey = (colour.mean(1, keepdim=True).expand_as(colour) * 255).round() / 255
    ours = (_jpeg.roundtrip(grey, quality, half_away).clamp(0, 1) * 255).round()
    difference = (ours - real_jpeg(grey, quality)[0] * 255).abs()
    assert difference.mean() < 0.4
    assert (difference <= 1).float().mean() > 0.97


def test_soft_error_follows_the_error_of_the_real_codec(pictures: Tensor) -> None:
    """Root mean square error within 12 % of the real codec's for every picture, in nearly the same order."""
    real = ((pictures - real_jpeg(pictures, 50)[0]) * 255).square().mean((1, 2, 3)).sqrt()
    soft = _jpeg.error(pictures, 50)
    assert torch.allclose(soft, real, rtol=0.12)
    assert spearmanr(soft, real).statistic > 0.98


def test_error_rises_with_the_size_of_the_file(pictures: Tensor) -> None:
    """Over pictures from smooth to noisy, Spearman's correlation with the real file's size exceeds 0.85.

    Each single picture's error falls with every step of blurring, as its file does.
    """
    generator = torch.Generator().manual_seed(0)
    noisy = (pictures + 0.05 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
    series = [noisy, pictures, *(blurred(pictures, sigma) for sigma in (0.7, 1.2, 2.0, 3.5))]
    errors = torch.stack([_jpeg.error(x, 50) for x in series])
    sizes = torch.tensor([real_jpeg(x, 95)[1] for x in series])
    assert spearmanr(errors.flatten(), sizes.flatten()).statistic > 0.85
    assert bool((sizes.diff(dim=0) <= 0).all())
    assert bool((errors.diff(dim=0) < 0).all())


@pytest.mark.parametrize(("size", "quality"), [((16, 16), 50), ((19, 5), 75)])
def test_gradient_equals_finite_differences(size: tuple[int, int], quality: int) -> None:
    """In float64, along random directions, to 1e-5 of the gradient's norm; pictures reach beyond [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(_jpeg.error(x, quality).sum(), x)
    for _ in range(5):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        h = 1e-7
        with torch.no_grad():
            rise = (_jpeg.error(x + h * direction, quality) - _jpeg.error(x - h * direction, quality)).sum() / (2 * h)
        assert abs(float((gradient * direction).sum() - rise)) < 1e-5 * float(gradient.norm())


def test_following_the_gradient_shrinks_the_real_file(pictures: Tensor) -> None:
    """Twenty small steps of descent on the error make every file smaller, and steps of ascent larger."""
    before = torch.tensor(real_jpeg(pictures, 95)[1])
    for sign, smaller in ((-1, True), (1, False)):
        x = pictures.clone()
        for _ in range(20):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(_jpeg.error(x, 50).sum(), x)
            x = (x + sign * 0.3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach()
        after = torch.tensor(real_jpeg(x, 95)[1])
        assert bool(((after < before) if smaller else (after > before)).all())


def test_other_sizes_are_continued_by_their_edge(pictures: Tensor) -> None:
    """A picture of 50x37 decodes as the same picture continued to 64x48 by hand does, up to the cut chroma's edge."""
    cut = pictures[:, :, :50, :37]
    by_hand = F.pad(cut, (0, 48 - 37, 0, 64 - 50), mode="replicate")
    expected = _jpeg.roundtrip(by_hand, 50, torch.round)[:, :, :49, :35]
    assert torch.allclose(_jpeg.roundtrip(cut, 50, torch.round)[:, :, :49, :35], expected, atol=1e-5)


def test_nothing_lost_gives_no_error_and_a_finite_gradient() -> None:
    """Mid-grey is reproduced exactly: error at the floor of 0.001 levels, gradient 0, not NaN."""
    x = torch.full((1, 3, 16, 16), 128 / 255, dtype=torch.float64, requires_grad=True)
    error = _jpeg.error(x, 50)
    error.sum().backward()
    assert float(error.detach()) == pytest.approx(1e-3, abs=1e-6)
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6


def test_soft_rounding_is_close_to_rounding_with_the_stated_slope() -> None:
    """At most 1/8 off, equal at integers, slope 3 (x - round(x))^2."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    y = _jpeg.soft_round(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert float((y - x.round()).detach().abs().max()) <= 0.125 + 1e-12
    assert torch.allclose(slope, 3 * (x - x.round()).detach() ** 2)
